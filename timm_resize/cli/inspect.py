"""Tell what a checkpoint file is: which model, which image size, where from, and what opens it.

What this package, timm's training script or a config.json beside the file recorded is believed; else the file's name is
tried, and the shapes of its tensors tell the size. Only names and shapes are read of a safetensors file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_resize.cli._common import add_json_argument, keyword
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, text

if TYPE_CHECKING:
    from torch import Tensor, nn

EXAMPLE = "timm-resize inspect levit-320x448"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("file", metavar="FILE", help="a checkpoint file, or a folder that a model was saved to")
    parser.add_argument("--model", metavar="NAME", help="the timm model that it is of, where nothing tells")
    parser.add_argument(
        "--model-kwargs", type=keyword, nargs="+", default=[], metavar="KEY=VALUE", help="its arguments, e.g. depth=6"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Print what was found, a line each."""
    found = describe(Path(args.file), args.model, dict(args.model_kwargs))
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        lines = value if isinstance(value, list) and name != "img_size" else [value]
        for i, line in enumerate(lines):
            shown = text((line[0], line[1])) if name == "img_size" and line else "not known" if line is None else line
            print(f"{name if i == 0 else '':<12} {shown}")


def describe(path: Path, model: str | None = None, kwargs: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Return what can be told of a checkpoint, each fact with where it comes from.

    Raises:
        ResizeError: There is no such file, or it cannot be read as a checkpoint.
    """
    from timm_resize.cli._sources import build, classes_in
    from timm_resize.core.find import current_size
    from timm_resize.hub.card import event_line
    from timm_resize.weights.names import by_own_names
    from timm_resize.weights.provenance import adopted
    from timm_resize.weights.source import source_geometry

    file = path / "model.safetensors" if path.is_dir() else path
    tensors, recorded, args_model = _read(file)
    name, known_by = _model(file, model, args_model)
    out: dict[str, Any] = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "tensors": len(tensors),
        "model": name,
        "known_by": known_by,
        "img_size": recorded,
        "size_by": None if recorded is None else "recorded in the file",
        "num_classes": None,
        "history": [event_line(event) for event in adopted(file, file.name)[:-1]],
        "opens_with": [],
    }
    if name is None:
        out["opens_with"] = ["give --model NAME, the timm model that it is of"]
        return out
    root = build(name, {**_config_arguments(file), **(kwargs or {})}, meta=True)
    try:
        own = by_own_names(tensors, root, recorded=recorded)[1]
    except ResizeError as error:
        out["opens_with"] = [f"nothing as {name}: {error}"]
        return out
    geometry = source_geometry(own, root, recorded=recorded)
    if recorded is None and geometry is not None:
        out["img_size"], out["size_by"] = (
            geometry.get("img_size") or current_size(root),
            "as the shapes of its tensors tell",
        )
    out["num_classes"] = classes_in(own, root)
    out["opens_with"] = _openers(
        file, name, root, out["img_size"], {"num_classes": out["num_classes"], **(kwargs or {})}
    )
    return out


def _read(file: Path) -> tuple[Mapping[str, Tensor], Size | None, str | None]:
    """Return the tensors (of safetensors without values), the size on record, and the model that training saved."""
    import torch
    from safetensors import SafetensorError, safe_open

    from timm_resize.weights.checkpoint import read_checkpoint
    from timm_resize.weights.provenance import recorded_size

    if not file.is_file():
        raise ResizeError(f"{file}: there is no such file.")
    if file.suffix != ".safetensors":
        checkpoint = read_checkpoint(file)
        saved = checkpoint.content.get("args")
        arch = checkpoint.content.get("arch") or getattr(saved, "model", None)
        return checkpoint.state_dict(), checkpoint.img_size, arch if isinstance(arch, str) else None
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ResizeError(f"{file} cannot be read: {error}. Fetch or save it again.") from error
    return {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}, recorded_size(file), None


def _model(file: Path, given: str | None, saved: str | None) -> tuple[str | None, str | None]:
    """Return the name of the timm model that a file is of, and what says so."""
    from timm.models import is_model

    from timm_resize.weights.provenance import read_metadata

    candidates = (
        (given, "--model"),
        (_config(file).get("architecture"), "config.json beside it"),
        (read_metadata(file).get("architecture"), "recorded in the file"),
        (saved, "its training's arguments"),
        (file.name.partition(".")[0], "the file's name"),
        (file.absolute().parent.name.partition(".")[0], "the folder's name"),
    )
    found = ((name, by) for name, by in candidates if isinstance(name, str) and (name is given or is_model(name)))
    return next(found, (None, None))


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.with_name("config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _config_arguments(file: Path) -> dict[str, Any]:
    arguments = _config(file).get("model_args")
    return arguments if isinstance(arguments, dict) else {}


def _openers(file: Path, name: str, root: nn.Module, size: Size | None, kwargs: Mapping[str, object]) -> list[str]:
    """Return the calls that open a file, stock's first where it can."""
    from timm_resize.core.find import current_size
    from timm_resize.hub.save import stock_misfit

    if _config(file).get("architecture") and file.name == "model.safetensors":
        folder = file.parent
        misfit = stock_misfit(folder)
        call = f'create_model("local-dir:{folder}", pretrained=True)'
        return [f"timm.{call}"] if misfit is None else [f"timm_resize.{call}", f"not stock timm: {misfit}"]
    path = os.fspath(file)
    asked = "".join(f", {key}={value!r}" for key, value in kwargs.items() if value is not None)
    call = f'create_model("{name}"{asked}, checkpoint_path="{path}"'
    stock = [f"timm.{call})"] if size == current_size(root) else []
    sized = [f"timm_resize.{call}, img_size={size})"] if size and not stock else []
    return [*stock, *sized, f"timm-resize convert {path} --model {name} --img-size S --output DIR"]
