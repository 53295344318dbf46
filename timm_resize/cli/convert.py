"""Write a checkpoint resized to another image size.

Reads the source at its own size, resizes it, and writes safetensors, a config and a model card, which
timm.create_model("local-dir:DIR", pretrained=True) reads, with or without this package. Tensors of a safetensors
file that do not depend on the size go from its mapping into the new file without being copied in memory.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from timm_resize.cli._common import add_json_argument, add_resize_arguments, resize_options, size, steps
from timm_resize.errors import CheckpointError, ResizeError

if TYPE_CHECKING:
    from torch import Tensor, nn

EXAMPLE = "timm-resize convert levit_128s --img-size 320x448 --no-pretrained --output levit-320x448"

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a timm model name (with tag), local-dir:FOLDER, hf-hub:OWNER/NAME, or a checkpoint "
        "file (.safetensors, .pth) with --model",
    )
    add_resize_arguments(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to, made if missing")
    parser.add_argument("--model", metavar="NAME", help="the timm model that a checkpoint file is of")
    parser.add_argument(
        "--source-size",
        type=size,
        metavar="S",
        help="image size a checkpoint file was saved at, where its shapes cannot tell",
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="another number of classes: a new classifier")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights; nothing is downloaded")
    parser.add_argument("--force", action="store_true", help="overwrite a model in DIR")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Convert, and print the plan and what was written."""
    folder = Path(args.output)
    _check_arguments(args, folder)
    from timm_resize.cli._sources import build, check_space, fetch, size_in_bytes
    from timm_resize.hub.save import save_pretrained, stock_misfit
    from timm_resize.resize import resize_

    kwargs: dict[str, object] = dict(args.model_kwargs)
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    with steps(args, "checking", "reading weights", "resizing", "writing", "checking what was written") as begin:
        begin()
        check_space(folder, 0)
        options = resize_options(args)
        if not _is_file(args.source) and not args.no_pretrained:
            trial = build(args.source, kwargs, meta=True)  # what cannot be, before minutes of work
            resize_(trial, args.img_size, **options)
            check_space(folder, size_in_bytes(trial))
            fetch(trial, args.source)
        begin()
        if _is_file(args.source):
            model = _from_file(args, kwargs)
        else:
            model = build(args.source, kwargs) if args.no_pretrained else _open(args.source, kwargs)
        begin()
        plan = resize_(model, args.img_size, **options)
        check_space(folder, size_in_bytes(model))
        begin()
        files = save_pretrained(model, folder)
        begin()
        misfit = stock_misfit(folder)
    package = "timm" if misfit is None else "timm_resize"
    load = f'{package}.create_model("local-dir:{folder}", pretrained=True)'
    if args.json:
        print(json.dumps({"plan": plan.to_dict(), "files": list(map(str, files)), "stock": not misfit, "load": load}))
        return
    print(plan.summary())
    for path in files:
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    if misfit is not None:
        print(f"note: stock timm cannot build this size ({misfit})")
    print(f"load it with {load}")


def _check_arguments(args: argparse.Namespace, folder: Path) -> None:
    """Check what needs no model, before timm is imported."""
    if folder.exists() and not folder.is_dir():
        raise ResizeError(f"--output {folder} is a file. Give a folder.")
    old = [name for name in ("model.safetensors", "config.json") if (folder / name).exists()]
    if old and not args.force:
        raise ResizeError(f"--output {folder} already holds {' and '.join(old)}. Use --force to overwrite.")
    if _is_file(args.source):
        if not os.path.isfile(args.source):
            raise ResizeError(f"{args.source}: there is no such file. Check the path.")
        if args.model is None:
            raise ResizeError(f"{args.source} is a checkpoint file. Give --model NAME, the timm model it is of.")
        if args.no_pretrained:
            raise ResizeError(f"{args.source} would not be read with --no-pretrained. Leave one of them out.")
        return
    for option, given in (("--model", args.model), ("--source-size", args.source_size)):
        if given is not None:
            raise ResizeError(f"{option} goes with a checkpoint file, not with {args.source}. Leave it out.")


def _is_file(source: str) -> bool:
    return os.path.isfile(source) or (source.endswith(SUFFIXES) and not source.startswith(("hf-hub:", "local-dir:")))


def _from_file(args: argparse.Namespace, kwargs: Mapping[str, object]) -> nn.Module:
    """Build the model at the size that the file was saved at, and load it there."""
    from timm_resize.cli._sources import build, classes_in
    from timm_resize.weights.provenance import recorded_size
    from timm_resize.weights.source import source_geometry

    path = args.source
    overlay: dict[str, object] = {"file": path}
    meta_model = build(args.model, kwargs, meta=True)
    state_dict = _read(path)
    classes = classes_in(state_dict, meta_model)
    if classes is not None:
        overlay["num_classes"] = classes
    if args.source_size is None and source_geometry(state_dict, meta_model, recorded=recorded_size(path)) is None:
        raise CheckpointError(
            f"{args.model}: {path} fits no square image size. Give --source-size HxW, the size it was saved at."
        )
    return _open(args.model, {**kwargs, "source_size": args.source_size, "pretrained_cfg_overlay": overlay})


def _open(name: str, kwargs: Mapping[str, object]) -> nn.Module:
    """Build a pretrained model whose tensors stay in their mapped file where they can: never all in memory."""
    from timm_resize.cli._sources import build
    from timm_resize.plugin.create_model import open_at_own_size

    return build(name, kwargs, create=open_at_own_size)


def _read(path: str) -> dict[str, Tensor]:
    from timm.models import load_state_dict

    try:
        return dict(load_state_dict(path))
    except Exception as error:  # each format has errors of its own
        raise CheckpointError(
            f"{path} cannot be read: {str(error) or type(error).__name__}. Give a checkpoint file."
        ) from error
