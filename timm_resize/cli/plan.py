"""Show what a resize would change and cost.

Lists every tensor that would change (old and new shape, and how it is carried over), then tokens, parameters,
operations and attention memory for one image before and after. Nothing is downloaded, computed or written.
"""

from __future__ import annotations

import argparse

from timm_resize.cli._common import add_resize_arguments, build, resize_options
from timm_resize.cost import measure, table
from timm_resize.errors import ResizeError
from timm_resize.resize import resize_

EXAMPLE = "timm-resize plan swin_tiny_patch4_window7_224 --img-size 320x448"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a timm model name, or local-dir:FOLDER")
    add_resize_arguments(parser)
    parser.add_argument("--attributes", action="store_true", help="list the Python attributes that change too")


def run(args: argparse.Namespace) -> None:
    """Print the plan and the costs."""
    if args.model.partition(":")[0].lower() in ("hf-hub", "hf_hub"):
        raise ResizeError(f"plan: MODEL={args.model} would be downloaded. Give the architecture's name, or convert it.")
    model = build(args.model, dict(args.model_kwargs), meta=True)
    before = measure(model)
    plan = resize_(model, args.img_size, **resize_options(args))
    print(plan.summary(attributes=args.attributes))
    print()
    print(table(before, measure(model)))
