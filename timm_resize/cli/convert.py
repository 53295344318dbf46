"""Write a checkpoint resized to another image size.

Reads the source at its own size, resizes it, and writes safetensors, a config and a model card, which
timm.create_model("local-dir:DIR", pretrained=True) reads, with or without this package. Tensors of a safetensors
file that do not depend on the size go from its mapping into the new file without being copied in memory.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor, nn

from timm_resize.cli._common import add_resize_arguments, build, resize_options, size
from timm_resize.errors import CheckpointError, ResizeError
from timm_resize.hub.save import CONFIG, WEIGHTS, save_pretrained, stock_misfit
from timm_resize.plugin.create_model import open_at_own_size
from timm_resize.resize import resize_
from timm_resize.weights.provenance import recorded_size
from timm_resize.weights.source import source_geometry

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


def run(args: argparse.Namespace) -> None:
    """Convert, and print the plan and what was written."""
    folder = Path(args.output)
    _check_folder(folder, args.force)
    kwargs: dict[str, object] = dict(args.model_kwargs)
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    if _is_file(args.source):
        model = _from_file(args, kwargs)
    else:
        _check_name(args)
        model = build(args.source, kwargs) if args.no_pretrained else _open(args.source, kwargs)
    plan = resize_(model, args.img_size, **resize_options(args))
    print(plan.summary())
    for path in save_pretrained(model, folder):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    misfit = stock_misfit(folder)
    if misfit is None:
        print(f'load it with timm.create_model("local-dir:{folder}", pretrained=True)')
    else:
        print(f"note: stock timm cannot build this size ({misfit})")
        print(f'load it with timm_resize.create_model("local-dir:{folder}", pretrained=True, img_size={plan.new_size})')


def _check_folder(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ResizeError(f"convert: --output={folder} is a file. Give a folder.")
    old = [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]
    if old and not force:
        raise ResizeError(f"convert: --output={folder} already holds {' and '.join(old)}. Use --force to overwrite.")


def _is_file(source: str) -> bool:
    return os.path.isfile(source) or (source.endswith(SUFFIXES) and not source.startswith(("hf-hub:", "local-dir:")))


def _check_name(args: argparse.Namespace) -> None:
    for option, given in (("--model", args.model), ("--source-size", args.source_size)):
        if given is not None:
            raise ResizeError(
                f"convert: {option}={given} goes with a checkpoint file, not {args.source}. Leave it out."
            )
    if os.path.isdir(args.source):
        raise ResizeError(f"convert: SOURCE={args.source} is a folder. Use local-dir:{args.source}.")


def _from_file(args: argparse.Namespace, kwargs: Mapping[str, object]) -> nn.Module:
    """Build the model at the size that the file was saved at, and load it there."""
    path = args.source
    if not os.path.isfile(path):
        raise ResizeError(f"convert: SOURCE={path} is not there. Check the path.")
    if args.model is None:
        raise ResizeError(f"convert: SOURCE={path} is a checkpoint file. Give --model=NAME, the timm model it is of.")
    if args.no_pretrained:
        raise ResizeError(f"convert: SOURCE={path} with --no-pretrained would not be read. Leave one of them out.")
    overlay: dict[str, object] = {"file": path}
    state_dict = _read(path)
    meta_model = build(args.model, kwargs, meta=True)
    classes = _classes(meta_model, state_dict)
    if classes is not None:
        overlay["num_classes"] = classes
    if args.source_size is None and source_geometry(state_dict, meta_model, recorded=recorded_size(path)) is None:
        raise CheckpointError(
            f"{args.model}: {path} fits no square image size. Give --source-size=HxW, the size it was saved at."
        )
    return _open(args.model, {**kwargs, "source_size": args.source_size, "pretrained_cfg_overlay": overlay})


def _open(name: str, kwargs: Mapping[str, object]) -> nn.Module:
    """Build a pretrained model whose tensors stay in their mapped file where they can: never all in memory."""
    return build(name, kwargs, create=open_at_own_size)


def _read(path: str) -> dict[str, Tensor]:
    try:
        return dict(load_state_dict(path))
    except Exception as error:  # each format has errors of its own
        raise CheckpointError(f"convert: SOURCE={path} cannot be read: {error}. Give a checkpoint file.") from None


def _classes(model: nn.Module, state_dict: Mapping[str, Tensor]) -> int | None:
    """Return how many classes the checkpoint's classifier has, None when it cannot be told."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        weight = state_dict.get(f"{name}.weight")
        if weight is not None:
            return int(weight.shape[0])
    return None
