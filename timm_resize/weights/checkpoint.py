"""A checkpoint file of any image size into a model."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from typing import Any

from timm.models import _helpers
from torch import nn

from timm_resize.core.find import find_model
from timm_resize.errors import CheckpointError
from timm_resize.plugin.patch import original
from timm_resize.weights.provenance import adopt_, recorded_size
from timm_resize.weights.source import shape_mismatch
from timm_resize.weights.state_dict import check_types, fitted, other_model_error

_stock_load_checkpoint = original(getattr(_helpers, "load_checkpoint", None))


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str,
    use_ema: bool = True,
    device: Any = "cpu",
    strict: bool = True,
    remap: bool = False,
    filter_fn: Any = None,
    weights_only: bool = True,
) -> Any:
    """As `timm.models.load_checkpoint`, for a checkpoint of another image size too."""
    root, path = find_model(model), str(checkpoint_path)
    if remap or os.path.splitext(path)[-1].lower() in (".npz", ".npy"):
        return _stock_load_checkpoint(model, path, use_ema, device, strict, remap, filter_fn, weights_only)
    state_dict = _read(path, use_ema, device, weights_only)
    if filter_fn:
        state_dict = filter_fn(state_dict, model)
    tensors, plan = fitted(state_dict, root, recorded=recorded_size(path))
    _check_all(tensors, root, strict)
    keys = root.load_state_dict(tensors, strict=strict)
    adopt_(root, path, plan)
    return keys


def _check_all(state_dict: Mapping[str, Any], root: nn.Module, strict: bool) -> None:
    """Raise CheckpointError before anything is loaded where `load_state_dict` would raise half-way."""
    own = root.state_dict()
    missing = [k for k in own if k not in state_dict] if strict else []
    unexpected = [k for k in state_dict if k not in own] if strict else []
    misfit = shape_mismatch({k: tuple(v.shape) for k, v in own.items()}, state_dict, ())
    if missing or unexpected or misfit:
        raise other_model_error(type(root).__name__, missing, unexpected, [misfit] if misfit else [])
    check_types(state_dict, root)


def _read(path: str, use_ema: bool, device: Any, weights_only: bool) -> Any:
    try:
        return _helpers.load_state_dict(path, use_ema, device=device, weights_only=weights_only)
    except OSError:  # not there, not readable
        raise
    except Exception as error:  # each format has errors of its own
        said = textwrap.shorten(str(error), 600, placeholder=" …")
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {said} Fetch or save it again.") from None


def seam(
    model, checkpoint_path, use_ema=True, device="cpu", strict=True, remap=False, filter_fn=None, weights_only=True
):
    """Stand in for the body of `timm.models.load_checkpoint`."""
    from timm_resize.weights.checkpoint import load_checkpoint

    return load_checkpoint(model, checkpoint_path, use_ema, device, strict, remap, filter_fn, weights_only)
