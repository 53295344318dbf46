"""A checkpoint file of any image size into a model."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import safetensors.torch
import torch
from timm.models import _helpers
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from timm_resize.core.find import current_size, find_model
from timm_resize.core.transaction import Transaction, write_all
from timm_resize.errors import CheckpointError, ResizeError
from timm_resize.geometry import Size, SizeLike, parse_size
from timm_resize.weights.names import Filter, bare, by_own_names, path_in, unpacked
from timm_resize.weights.provenance import adopt_, recorded_size
from timm_resize.weights.source import source_geometry
from timm_resize.weights.state_dict import check_fits, fitted

_SAFE = getattr(torch.serialization, "safe_globals", nullcontext)  # torch 2.4 has none


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        content: All of it: a state dict, or what a program keeps one in.
        img_size: (H, W) that the file records, by this package or by timm's training script; None where it does not.
    """

    content: Mapping[str, Any]
    img_size: Size | None

    def state_dict(self, use_ema: bool = True) -> Mapping[str, Any]:
        """Return the state dict, of the averaged weights if there are any and they are wanted."""
        return unpacked(self.content, use_ema)


def read_checkpoint(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", weights_only: bool = True
) -> Checkpoint:
    """Read a file.

    Raises:
        CheckpointError: It cannot be read as a checkpoint.
        OSError: There is none, or it may not be read.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file.")
    try:
        if path.endswith(".safetensors"):
            content: object = safetensors.torch.load_file(path, device=device)
        else:
            with _SAFE([argparse.Namespace]):  # the arguments that timm's training script saves
                content = torch.load(path, map_location=device, weights_only=weights_only)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # each format has errors of its own
        why = textwrap.shorten(str(error), 600, placeholder=" …")
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {why} Fetch or save it again.") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors. Save a state dict.")
    return Checkpoint(content, recorded_size(path) or _argument_size(content.get("args")))


def saved_size(checkpoint: Checkpoint, root: nn.Module) -> Size | None:
    """Return the image size (H, W) of a model's checkpoint: as recorded, else as its tensors' shapes tell."""
    if checkpoint.img_size is not None:
        return checkpoint.img_size
    found = source_geometry(by_own_names(checkpoint.state_dict(use_ema=False), root)[1], root)
    return None if found is None else found.get("img_size", current_size(root))


def _argument_size(args: object) -> Size | None:
    """Return the size that timm's training script was called with, as it saves its arguments with the weights."""
    given = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    model_kwargs = given.get("model_kwargs")
    inner = model_kwargs.get("img_size") if isinstance(model_kwargs, Mapping) else None
    input_size = given.get("input_size")
    for size in (inner, input_size[1:] if isinstance(input_size, (list, tuple)) else None, given.get("img_size")):
        try:
            if size is not None:
                return parse_size(size)
        except ResizeError:  # written by somebody else: no size
            continue
    return None


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike[str],
    use_ema: bool = True,
    device: str | torch.device = "cpu",
    strict: bool = True,
    remap: bool = False,
    filter_fn: Filter | None = None,
    weights_only: bool = True,
    *,
    source_size: SizeLike | None = None,
    undo: bool = True,
) -> _IncompatibleKeys:
    """As `timm.models.load_checkpoint`, for a checkpoint of another image size too.

    Args:
        source_size: Image size (H, W) of the checkpoint; by default as recorded in it, or as its shapes tell.
        undo: Keep what the tensors held until all are loaded, so that even a failed copy leaves them as they were.

    Raises:
        CheckpointError: It cannot be read, is not of this model, or fits no size that is known. Nothing was loaded.
    """
    root, path = find_model(model), str(checkpoint_path)
    if os.path.splitext(path)[-1].lower() in (".npz", ".npy"):
        if not hasattr(model, "load_pretrained"):
            raise NotImplementedError("Model cannot load numpy checkpoint")  # as stock
        return model.load_pretrained(path)  # type: ignore[operator]
    checkpoint = read_checkpoint(path, device, weights_only)
    state_dict = checkpoint.state_dict(use_ema)
    if remap:
        return model.load_state_dict(_helpers.remap_state_dict(state_dict, model), strict=strict)
    if filter_fn:
        state_dict = filter_fn(state_dict, model)
    outer = path_in(model, root)
    names, tensors = by_own_names(state_dict, root, outer, checkpoint.img_size)
    tensors, plan = fitted(tensors, root, source=source_size, recorded=checkpoint.img_size, keyword="source_size")
    if bare(names.prefix) and bare(names.prefix) == bare(outer):  # of all that holds the model, not of it alone
        target, tensors = model, names.put_back(tensors, state_dict, outer)
    else:
        target, tensors = root, names.with_unknown(tensors, state_dict)
    check_fits(tensors, target, strict)
    own = target.state_dict().keys()
    if undo:
        write_all([partial(Transaction.load, module=target, state_dict=tensors)])
    else:
        target.load_state_dict(tensors, strict=strict)
    adopt_(root, path, plan)
    return _IncompatibleKeys([k for k in own if k not in tensors], [k for k in tensors if k not in own])
