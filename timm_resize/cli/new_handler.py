"""Print the skeleton of a handler for a model's class.

Builds the model at two image sizes without weights, lists the parameters, buffers and attributes that differ, and
writes for each the likely rule. Read the model's forward before you believe it: grids follow forward's rounding.
"""

from __future__ import annotations

import argparse

from timm_resize.cli._common import keyword

EXAMPLE = "timm-resize new-handler vit_tiny_patch16_224 > my_handler.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a timm model name")
    parser.add_argument("--model-kwargs", type=keyword, nargs="+", default=[], metavar="KEY=VALUE", help="e.g. depth=1")


def run(args: argparse.Namespace) -> None:
    """Print the file."""
    from timm_resize.cli._skeleton import skeleton
    from timm_resize.cli._sources import check_name

    check_name(args.model)
    print(skeleton(args.model, **dict(args.model_kwargs)))
