"""Set several sizes, or several models, side by side.

A row for each model at each size: tokens, parameters, operations and attention memory for one image, and how many
tensors a resize changes; or why the size cannot be. Nothing is downloaded, computed or written.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from timm_resize.cli._common import add_json_argument, add_resize_arguments, in_options, resize_options, table
from timm_resize.errors import ResizeError
from timm_resize.geometry import SizeLike, text

EXAMPLE = "timm-resize compare levit_128s vit_tiny_patch16_224 --img-size 224 256 320x448"

HEADER = ("model", "size", "tokens", "params M", "GMACs", "attn MiB", "tensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("models", metavar="MODEL", nargs="+", help="timm model names, or local-dir:FOLDER")
    add_resize_arguments(parser, several=True)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Print the table; raises what is wrong where no row has anything to compare."""
    records = [_record(args, name, size) for name in args.models for size in args.img_size]
    errors = [record["error"] for record in records if "error" in record]
    if len(errors) == len(records):
        raise ResizeError(errors[0])
    if args.json:
        print(json.dumps(records))
        return
    print(table([HEADER, *(_row(record) for record in records if "plan" in record)]))
    print("\ntokens of the first stage; attn: the largest layer's scores of one image in fp32; tensors that change")
    for error in errors:
        print(f"not possible: {error}")


def _record(args: argparse.Namespace, name: str, size: SizeLike) -> dict[str, Any]:
    """Return a model's plan and cost at a size, or the error that stands in their place."""
    from timm_resize.cli._sources import on_meta
    from timm_resize.cost import measure
    from timm_resize.resize import resize_

    model = on_meta(name, dict(args.model_kwargs))
    try:
        plan = resize_(model, size, **resize_options(args))
        cost = measure(model)
    except ResizeError as error:
        one = argparse.Namespace(**{**vars(args), "img_size": size})
        return {"model": name, "img_size": size, "error": in_options(f"{name}: {error}", one)}
    return {"model": name, "img_size": plan.new_size, "plan": plan.to_dict(), "cost": cost.to_dict()}


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    cost, changes = record["cost"], record["plan"]["changes"]
    attention = f"{max(cost['attention']) * 4 / 2**20:.1f}" if cost["attention"] else "-"
    numbers = (f"{cost['parameters'] / 1e6:.1f}", f"{cost['flops'] / 2e9:.2f}", attention)
    tensors = sum(change["kind"] != "attribute" for change in changes)
    return record["model"], text(record["img_size"]), str((*cost["tokens"], "-")[0]), *numbers, str(tensors)
