"""Print a handler for a model's class, as builds at several image sizes tell it.

The file's docstring is the table of `timm_resize.infer`. What shapes do not tell is left as `...`. Read the model's
forward before you believe it: grids follow forward's rounding.
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
    import timm

    from timm_resize.builds.infer import infer, of_timm
    from timm_resize.cli._sources import check_name

    check_name(args.model)
    kwargs = dict(args.model_kwargs)
    found = infer(of_timm(lambda **size: timm.create_model(args.model, **kwargs, **size)), register=False)
    print(found.handler_source({args.model: kwargs}), end="")
