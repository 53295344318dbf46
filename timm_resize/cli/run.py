"""Run somebody else's script with the plugin in.

The script sees its own command line, and ends as it would under Python. Models that it creates without a size get that
of its --img-size or --input-size; checkpoints of other sizes load and resume. With -m, SCRIPT is a module.
"""

from __future__ import annotations

import argparse
import os

from timm_resize.errors import ResizeError

EXAMPLE = "timm-resize run train.py --model levit_128s --img-size 160 images"
OWN_OUTPUT = True
"""Warnings, logs and exceptions are the script's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="a Python script, such as timm's train.py")
    parser.add_argument("arguments", metavar="ARG", nargs=argparse.REMAINDER, help="the script's own command line")


def run(args: argparse.Namespace) -> None:
    """Run the script."""
    if not args.module and not os.path.exists(args.script):
        raise ResizeError(f"{args.script}: there is no such file.")
    from timm_resize.plugin.run_script import run_script

    run_script(args.script, args.arguments, module=args.module)
