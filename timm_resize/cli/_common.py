"""What subcommands share: reading sizes and options, and building models."""

from __future__ import annotations

import argparse
import ast
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from timm_resize.core.request import POLICIES, PRESETS
from timm_resize.errors import ResizeError
from timm_resize.geometry import SizeLike
from timm_resize.plugin.create_model import create_model
from timm_resize.resample.maps import MODES

RESIZE_OPTIONS = ("patch_size", "window_size", "window_policy", "interpolation", "antialias", "preset")


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


def add_resize_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `timm_resize.plan_resize`, and keywords for building the model."""
    parser.add_argument(
        "--img-size",
        type=size,
        required=True,
        metavar="S",
        help="new image size in pixels: 384, or 320x448 for height x width",
    )
    parser.add_argument("--patch-size", type=size, metavar="P", help="new patch size (default: kept)")
    parser.add_argument(
        "--window-size", type=size, metavar="W", help="new window size: 12, 8x12, or one per stage: 12,12,12,6"
    )
    parser.add_argument(
        "--window-policy",
        choices=POLICIES,
        help="without --window-size: as timm's set_input_size does it (default), keep the "
        "windows, or scale them with the image",
    )
    parser.add_argument("--interpolation", choices=(*MODES, "geometric"), help="default: timm's for the model")
    parser.add_argument("--antialias", action=argparse.BooleanOptionalAction, help="default: timm's for the model")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="interpolation as upstream code has it")
    parser.add_argument(
        "--model-kwargs",
        type=keyword,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="arguments for building the model, e.g. in_chans=1 depth=6",
    )


def resize_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given, for `timm_resize.plan_resize`."""
    return {name: getattr(args, name) for name in RESIZE_OPTIONS if getattr(args, name) is not None}


def build(
    name: str, kwargs: Mapping[str, object], *, meta: bool = False, create: Callable[..., nn.Module] = create_model
) -> nn.Module:
    """Create a model, on the meta device if asked; whatever fails there is the user's to fix."""
    try:
        with torch.device("meta" if meta else "cpu"):
            return create(name, **kwargs)
    except ResizeError:
        raise
    except Exception as error:  # constructors, file formats and the network raise what they like
        raise ResizeError(textwrap.shorten(f"{name}: {error}", 600, placeholder=" …")) from None
