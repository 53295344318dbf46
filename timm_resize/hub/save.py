"""Save a model at its present size, as safetensors and a config that stock timm rebuilds it from."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import DropPath
from timm.models import _hub
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_resize.core.find import current_size, find_model
from timm_resize.core.history import touched
from timm_resize.errors import ResizeError, UnsupportedModelError
from timm_resize.hub.atomic_files import STAGE, replace_files
from timm_resize.hub.card import is_ours, model_card
from timm_resize.plugin.create_model import NOT_BUILT, create_model
from timm_resize.weights.provenance import metadata

WEIGHTS = "model.safetensors"

CONFIG = "config.json"

CARD = "README.md"
LARGEST_CARD = 1 << 20
"""Bytes of a model card; a larger one was not written by this package."""


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], *, model_args: dict[str, Any] | None = None
) -> tuple[Path, Path]:
    """Write weights, config and a model card for `timm.create_model("local-dir:…", pretrained=True)`.

    The files are written in full beside the old ones, then replace them at one moment: an error leaves what was
    there, and a process that is killed leaves the old checkpoint or the new one. The metadata of the weights tells
    where they come from and what was done to them (`timm_resize.history`).

    Args:
        model: A timm model, or something that holds exactly one. Its weights are not changed.
        folder: Made when missing. Other files in it stay, a README.md that somebody wrote or edited too.
        model_args: Constructor arguments for the config, in place of recorded ones that JSON cannot hold.

    Returns:
        The paths of `model.safetensors` and of `config.json`.

    Raises:
        UnsupportedModelError: A model that timm's factory did not make or that was changed since, so that nothing
            would open what is saved; a feature extractor; tensors without values (meta device).
        ResizeError: An argument of the model's constructor is not JSON.

    Example:
        >>> import tempfile, timm, timm_resize
        >>> model = timm_resize.create_model("vit_tiny_patch16_224", img_size=96, depth=1)
        >>> folder = tempfile.mkdtemp()
        >>> [path.name for path in save_pretrained(model, folder)]
        ['model.safetensors', 'config.json']
        >>> timm.create_model(f"local-dir:{folder}", pretrained=True).patch_embed.img_size
        (96, 96)
    """
    root = find_model(model)
    _check(model, root)
    tensors, about = plain_tensors(root), metadata(root, touched(root))
    target = Path(folder)
    files: list[tuple[str, Callable[[Path], Any]]] = [
        (WEIGHTS, lambda path: save_file(tensors, path, metadata=about)),
        (CONFIG, lambda path: _write_checked_config(root, path, model_args)),
    ]
    if may_replace(target / CARD):
        files.append((CARD, lambda path: write_card(root, path, target.name, f"local-dir:{target.name}")))
    replace_files(target, files)
    return target / WEIGHTS, target / CONFIG


def may_replace(card: Path) -> bool:
    """Whether a model card is not there, or as this package wrote it; what is no plain file is not even read."""
    if not os.path.lexists(card):
        return True
    if card.is_symlink() and os.readlink(card).startswith(STAGE):  # of a save that was killed
        card = card.resolve()
    plain = stat.S_ISREG(card.lstat().st_mode) and card.lstat().st_size <= LARGEST_CARD
    return plain and is_ours(card.read_text(errors="replace"))


def write_card(root: nn.Module, path: Path, name: str, source: str) -> None:
    """Write the model card of a model whose weights and config are in the same folder."""
    path.write_text(model_card(root, name, source=source, misfit=stock_misfit(path.parent)))


def _check(model: nn.Module, root: nn.Module) -> None:
    name = type(root).__name__
    inside = {id(t) for t in (*root.parameters(), *root.buffers())}
    beside = next((k for k, t in model.state_dict(keep_vars=True).items() if id(t) not in inside), None)
    if beside is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {beside} is not of the {name} that it holds, and would be lost. Save that model "
            "alone, and the rest with torch.save."
        )
    config = getattr(root, "pretrained_cfg", None) or {}
    if not config.get("architecture") or not hasattr(root, "num_classes"):
        raise UnsupportedModelError(
            f"{name}: not a model that timm can rebuild from a config. Save the whole classification model that "
            "create_model returned, without features_only=True; of a model of another library, its state dict with "
            "torch.save."
        )
    missing = next((k for k, v in root.state_dict().items() if v.is_meta), None)
    if missing:
        raise UnsupportedModelError(f"{name}: {missing} has no values (meta device). Load weights, then save.")


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict as safetensors wants it: on the CPU, contiguous, no two sharing memory.

    Tensors that already are so are not copied, also those of a mapped file, which are parts of one storage.
    """
    out = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    end = 0
    for key, tensor in sorted(out.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            out[key] = tensor.clone()
        else:
            end = tensor.data_ptr() + tensor.nbytes
    return out


def _write_config(root: nn.Module, path: Path, model_args: dict[str, Any] | None) -> None:
    """Let timm write its config, then correct the input size that it takes from the source checkpoint.

    timm knows the present size of models that take `img_size` only.
    """
    try:
        _hub.save_config_for_hf(root, path, model_args=model_args)
    except ValueError as error:
        raise ResizeError(f"{type(root).__name__}: {error} Pass save_pretrained(..., model_args={{…}}).") from None
    config = json.loads(path.read_text())
    data, size = config["pretrained_cfg"], current_size(root)
    source = tuple(root.pretrained_cfg["input_size"][1:])  # type: ignore[index]
    if size is not None and size != source:
        data["input_size"] = [data["input_size"][0], *size]
        data["pool_size"] = None
        for name in ("test_input_size", "test_pool_size"):  # recommendations for the source's weights and size
            data.pop(name, None)
    _say_classifier_and_stem(root, config)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _say_classifier_and_stem(root: nn.Module, config: dict[str, Any]) -> None:
    """Let a config say the width of a plain classifier and the channels of the first convolution as they are now.

    The count of classes stands once: transformers' Auto classes take `model_args` and the count as keywords, and refuse
    it twice.
    """
    head = getattr(root, "get_classifier", nn.Identity)()
    if isinstance(head, nn.Linear) and head.out_features != config["num_classes"]:
        config["num_classes"] = config["pretrained_cfg"]["num_classes"] = head.out_features
    args, data = config.get("model_args", {}), config["pretrained_cfg"]
    args.pop("num_classes", None)
    if not args:
        config.pop("model_args", None)
    stem = data.get("first_conv")
    conv = root.get_submodule(stem) if isinstance(stem, str) else None
    if isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.kernel_size == conv.stride:  # a projection of patches
        data["input_size"] = [conv.in_channels, *data["input_size"][1:]]
        if "in_chans" in args:
            args["in_chans"] = conv.in_channels


def _write_checked_config(root: nn.Module, path: Path, model_args: dict[str, Any] | None) -> None:
    """Write the config, and refuse a model that nobody could open with it.

    Such as one whose classifier was replaced by another module, or that has layers added or taken away. The folder is
    opened as anybody would, on the meta device, with the shapes of the weights in their place.
    """
    _write_config(root, path, model_args)
    have = root.state_dict()
    empty = {key: tensor.detach().to("meta") for key, tensor in have.items()}
    name, why = f"local-dir:{path.parent}", ""
    with torch.device("meta"):
        try:
            overlay = {"state_dict": empty, "source": ""}
            opened = create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        except NOT_BUILT as error:
            why = f"it cannot be opened with its config ({' '.join(str(error).split())})"
            with suppress(*NOT_BUILT):  # what differs from a model that holds nothing yet says more
                why = _difference(have, timm.create_model(name).state_dict()) or why
        else:
            why = _difference(have, opened.state_dict()) or _other_layer(root, opened)
    if why:
        raise UnsupportedModelError(
            f"{type(root).__name__}: {why}. It would not open again as it is. Undo the change to that layer (merge "
            "adapters, remove pruning), build the model with arguments that say it, or save its state dict with "
            "torch.save."
        )


def _difference(have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """Return what the first tensor is that two state dicts do not have in the same shape, '' for none."""
    for key in {**have, **want}:
        here, there = (str(tuple(each[key].shape)) if key in each else "" for each in (have, want))
        if here != there:
            return f"{key} is {here or 'not there'}, and a model built from its config has {there or 'none'}"
    return ""


IDLE = (nn.Identity, nn.modules.dropout._DropoutNd, DropPath)
"""Layers that do nothing in evaluation, whatever their rate."""


def _other_layer(root: nn.Module, opened: nn.Module) -> str:
    """Return what the first layer is that computes something else than the one in its place, '' for none.

    A replaced activation, or a norm with another eps, holds the same tensors.
    """
    ours, theirs = dict(root.named_modules()), dict(opened.named_modules())
    for path in {**ours, **theirs}:
        here, there = (each.get(path, nn.Identity()) for each in (ours, theirs))
        if isinstance(here, IDLE) and isinstance(there, IDLE):
            continue
        if not _alike(type(here), type(there)) or here.extra_repr() != there.extra_repr():
            names = (f"{type(layer).__name__}({layer.extra_repr()})" for layer in (here, there))
            return f"{path or 'it'} is {', and opened with its config '.join(names)}"
    return ""


def _alike(one: type[nn.Module], other: type[nn.Module]) -> bool:
    """Whether layers of two classes compute the same: they are one class, or of torch's and timm's one is the other's.

    Such as timm's LayerNorm and torch's, or a batch norm that is synchronised between processes.
    """
    if one is other:
        return True
    base = _BatchNorm if issubclass(one, nn.SyncBatchNorm) else one
    known = all(cls.__module__.startswith(("torch.nn.", "timm.")) for cls in (one, other))
    return known and (issubclass(other, base) or issubclass(one, other))


def stock_misfit(folder: str | os.PathLike[str]) -> str | None:
    """Return why stock timm's `create_model("local-dir:…", pretrained=True)` cannot use a folder, None if it can.

    On the meta device: builds the model from the config, compares shapes with the header of the weights, and runs
    the forward at the config's input size.
    """
    path = Path(folder)
    try:
        with torch.device("meta"):
            model = timm.create_model(f"local-dir:{path}").eval()
            want = {k: list(v.shape) for k, v in model.state_dict().items()}
            with safe_open(path / WEIGHTS, framework="pt") as weights:
                have = {k: weights.get_slice(k).get_shape() for k in weights.keys()}  # noqa: SIM118
            if want.keys() != have.keys():
                return f"{min(want.keys() ^ have.keys())} is in only one of the two"
            for key in want:
                if want[key] != have[key]:
                    return f"{key} is {have[key]}, stock builds {want[key]}"
            with torch.no_grad():
                model(torch.empty(1, *model.pretrained_cfg["input_size"]))
    except OSError:  # the folder cannot be read, which says nothing of stock
        raise
    except Exception as error:  # whatever a constructor or a forward raises at a size that it does not expect
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
