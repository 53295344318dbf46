"""What subcommands share: reading sizes and options, and what goes to the terminal. Imports neither timm nor torch."""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from timm_resize.geometry import SizeLike

if TYPE_CHECKING:
    from timm_resize.core.request import ResizeOptions

RESIZE_OPTIONS = (
    "patch_size",
    "patch_resample",
    "window_size",
    "window_policy",
    "interpolation",
    "antialias",
    "preset",
)

PATCH_MAPS, POLICIES, PRESETS = ("pinv", "adjoint"), ("timm", "keep", "scale"), ("timm", "deit", "big_vision")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "geometric")
"""What `core.request` knows, which a test holds them to."""

LOGGERS = ("timm", "huggingface_hub", "timm_resize")
"""Whose warnings are about calls that the user of a command did not write; -v shows them."""


def size(text: str) -> SizeLike | tuple[SizeLike, ...]:
    """Read '384', '320x448' or '320,448' (height, width); with more commas, a list of such.

    Example:
        >>> size("384"), size("320x448"), size("320,448"), size("8x8,16x8,7")
        (384, (320, 448), (320, 448), ((8, 8), (16, 8), 7))
    """
    try:
        entries = tuple(_entry(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size. Use 384, or 320x448 for height x width.") from None
    return entries[0] if len(entries) == 1 else entries


def _entry(text: str) -> SizeLike:
    sides = tuple(int(side) for side in text.lower().split("x"))
    return sides[0] if len(sides) == 1 else sides


def keyword(text: str) -> tuple[str, object]:
    """Read 'key=value'; the value is a Python literal, or else a string.

    Example:
        >>> keyword("depth=2"), keyword("global_pool=avg"), keyword("window_size=(7, 14)")
        (('depth', 2), ('global_pool', 'avg'), ('window_size', (7, 14)))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value, e.g. in_chans=1.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def add_resize_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the options of `timm_resize.plan_resize`, and keywords for building the model."""
    parser.add_argument(
        "--img-size",
        type=size,
        nargs="+" if several else None,
        required=True,
        metavar="S",
        help="new image size in pixels: 384, or 320x448 for height x width",
    )
    parser.add_argument("--patch-size", type=size, metavar="P", help="new patch size (default: kept)")
    parser.add_argument(
        "--patch-resample", choices=PATCH_MAPS, help="of a patch that shrinks: as stock timm (default), or better"
    )
    parser.add_argument(
        "--window-size", type=size, metavar="W", help="new window size: 12, 8x12, or one per stage: 12,12,12,6"
    )
    parser.add_argument(
        "--window-policy",
        choices=POLICIES,
        help="without --window-size: as timm's set_input_size does it (default), keep the "
        "windows, or scale them with the image",
    )
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, help="default: timm's for the model")
    parser.add_argument("--antialias", action=argparse.BooleanOptionalAction, help="default: timm's for the model")
    parser.add_argument("--preset", choices=PRESETS, help="interpolation as upstream code has it")
    parser.add_argument(
        "--model-kwargs",
        type=keyword,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="arguments for building the model, e.g. in_chans=1 depth=6",
    )


def resize_options(args: argparse.Namespace) -> ResizeOptions:
    """Return the options that were given, for `timm_resize.plan_resize`."""
    given = {name: getattr(args, name) for name in RESIZE_OPTIONS if getattr(args, name) is not None}
    return given  # type: ignore[return-value]  # argparse has checked them


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add --json, for a subcommand that then prints one JSON value."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every subcommand knows of its output."""
    group = parser.add_argument_group("output")
    group.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors (and JSON where asked for)")
    group.add_argument("-v", "--verbose", action="store_true", help="show logs and warnings of timm and others too")
    group.add_argument("--traceback", action="store_true", help="show where in the code an error came from")


@contextmanager
def output(args: argparse.Namespace) -> Iterator[None]:
    """Print as -q and -v say; otherwise stderr is for our own errors, as what a resize warns of is in the plan.

    What other packages print, log and warn of is as before afterwards.
    """
    import logging
    import warnings

    import huggingface_hub.utils  # noqa: F401  # sets its logger's level as it is imported

    handler = logging.StreamHandler()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with ExitStack() as undo:
        if args.quiet:
            _without_bars(undo)
            if not getattr(args, "json", False):
                undo.enter_context(redirect_stdout(undo.enter_context(open(os.devnull, "w"))))
        for logger, level in zip(loggers, levels, strict=True):
            undo.callback(logger.setLevel, level)
            logger.setLevel(logging.INFO if args.verbose else logging.ERROR)
            if args.verbose:
                undo.callback(logger.removeHandler, handler)
                logger.addHandler(handler)
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default" if args.verbose else "ignore")
        yield


def _without_bars(undo: ExitStack) -> None:
    """Turn off the progress bars of downloads and uploads."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not are_progress_bars_disabled():
        undo.callback(enable_progress_bars)
        disable_progress_bars()


@contextmanager
def steps(args: argparse.Namespace, *names: str) -> Iterator[Callable[[], None]]:
    """Show on a terminal which of some long steps is running; yields what to call at the beginning of each."""
    from tqdm import tqdm

    hidden = args.quiet or not sys.stderr.isatty()
    with tqdm(total=len(names), leave=False, bar_format="{n_fmt}/{total_fmt} {desc} {elapsed}", disable=hidden) as bar:
        todo = iter(names)

        def begin() -> None:
            bar.set_description_str(next(todo), refresh=False)
            bar.update()

        yield begin


NARROW = 12
"""Columns that a table needs no wrapping below, in characters."""


def table(rows: Sequence[tuple[str, ...]], width: int | None = None) -> str:
    """Align columns; cells are wrapped, the widest column first, where the table exceeds `width` characters."""
    columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    while width is not None and sum(columns) + 2 * (len(columns) - 1) > width and max(columns) > NARROW:
        columns[columns.index(max(columns))] -= 1
    lines = []
    for row in (rows[0], tuple("-" * c for c in columns), *rows[1:]):
        cells = [textwrap.wrap(cell, c) or [""] for cell, c in zip(row, columns, strict=True)]
        for i in range(max(map(len, cells))):
            parts = ((cell[i] if i < len(cell) else "").ljust(c) for cell, c in zip(cells, columns, strict=True))
            lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


_ARGUMENT = re.compile(r"\b(\w+)=(\((?:[^()]|\([^()]*\))*\)|\[[^]]*\]|'[^']*'|-?\w+(?:\.\w+)*)")
_PAIR = re.compile(r"\((\d+), (\d+)\)")


def in_options(text: str, args: argparse.Namespace) -> str:
    """Return an error with arguments as they stand on the command line, where they were given there.

    Example:
        >>> args = argparse.Namespace(img_size=(8, 9), options={"img_size": "--img-size"})
        >>> in_options("ViT: img_size=(8, 9) is smaller than patch_size=16. Use img_size=16 or (16, 32).", args)
        'ViT: --img-size 8x9 is smaller than patch_size=16. Use --img-size 16 or 16x32.'
    """
    given = {
        name: option for name, option in getattr(args, "options", {}).items() if getattr(args, name, None) is not None
    }

    def as_typed(found: re.Match[str]) -> str:
        option = given.get(found[1])
        return f"{option} {_typed(found[2])}" if option else found[0]

    return _PAIR.sub(r"\1x\2", _ARGUMENT.sub(as_typed, text))


def _typed(value: str) -> str:
    """Write a Python value as one gives it on the command line."""
    try:
        entries = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    if not isinstance(entries, (tuple, list)):
        return str(entries)
    if all(isinstance(side, int) for side in entries):
        return str(entries[0]) if len({*entries}) == 1 and len(entries) == 2 else "x".join(map(str, entries))
    return ",".join(_typed(repr(entry)) for entry in entries)
