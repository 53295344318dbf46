"""The command line. Each module of this package without a leading underscore is a subcommand."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType

import timm
import torch

from timm_resize.errors import ResizeError
from timm_resize.version import __version__

NOISY = ("timm", "huggingface_hub")
"""Loggers whose warnings are about calls that the user of a command did not write."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-resize`; returns the exit status: 0, or 2 after an error told in one line on stderr.

    Example:
        >>> main(["plan", "vit_tiny_patch16_224", "--img-size", "8"])
        2
    """
    args = _parser().parse_args(argv)
    try:
        with nullcontext() if args.own_output else _quiet():
            args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ResizeError, OSError) as error:
        print(f"timm-resize: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.own_output:
            raise
        print("timm-resize: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timm-resize",
        description="Resize timm models to other image sizes, with their weights carried over.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"timm-resize {__version__} (timm {timm.__version__}, torch {torch.__version__})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    examples = []
    for name, module in _subcommands():
        text = (module.__doc__ or "").strip()
        examples.append(f"  {module.EXAMPLE}")
        command = commands.add_parser(
            name,
            help=text.splitlines()[0].rstrip("."),
            description=text,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, own_output=getattr(module, "OWN_OUTPUT", False))
    parser.epilog = "\n".join(["examples:", *examples])
    return parser


def _subcommands() -> Iterator[tuple[str, ModuleType]]:
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            yield info.name.replace("_", "-"), importlib.import_module(f"{__name__}.{info.name}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave stderr to our own errors; what a resize warns of is in the plan that the commands print."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
