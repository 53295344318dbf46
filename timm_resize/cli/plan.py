"""Show what a resize would change and cost.

Lists every tensor that would change (old and new shape, and how it is carried over), then tokens, parameters,
operations and attention memory for one image before and after. Nothing is downloaded, computed or written.
"""

from __future__ import annotations

import argparse
import json

from timm_resize.cli._common import add_json_argument, add_resize_arguments, resize_options

EXAMPLE = "timm-resize plan swin_tiny_patch4_window7_224 --img-size 320x448"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a timm model name, or local-dir:FOLDER")
    add_resize_arguments(parser)
    parser.add_argument("--attributes", action="store_true", help="list the Python attributes that change too")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Print the plan and the costs."""
    from timm_resize.cli._sources import on_meta
    from timm_resize.cost import measure, table
    from timm_resize.resize import resize_

    model = on_meta(args.model, dict(args.model_kwargs))
    before = measure(model)
    plan = resize_(model, args.img_size, **resize_options(args))
    after = measure(model)
    if args.json:
        print(json.dumps({"plan": plan.to_dict(), "cost": {"before": before.to_dict(), "after": after.to_dict()}}))
        return
    print(plan.summary(attributes=args.attributes))
    print()
    print(table(before, after))
