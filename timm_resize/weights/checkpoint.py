"""A checkpoint file of any image size into a model."""

from __future__ import annotations

import os
import textwrap
from typing import Any

from timm.models import _helpers
from torch import nn

from timm_resize.core.find import find_model
from timm_resize.errors import CheckpointError
from timm_resize.weights.provenance import adopt_, recorded_size
from timm_resize.weights.state_dict import check_fits, fitted


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
    if os.path.splitext(path)[-1].lower() in (".npz", ".npy"):
        if not hasattr(model, "load_pretrained"):
            raise NotImplementedError("Model cannot load numpy checkpoint")  # as stock
        return model.load_pretrained(path)  # type: ignore[operator]
    state_dict = _read(path, use_ema, device, weights_only)
    if remap:
        return model.load_state_dict(_helpers.remap_state_dict(state_dict, model), strict=strict)
    if filter_fn:
        state_dict = filter_fn(state_dict, model)
    tensors, plan = fitted(state_dict, root, recorded=recorded_size(path))
    check_fits(tensors, root, strict)
    keys = root.load_state_dict(tensors, strict=strict)
    adopt_(root, path, plan)
    return keys


def _read(path: str, use_ema: bool, device: Any, weights_only: bool) -> Any:
    try:
        return _helpers.load_state_dict(path, use_ema, device=device, weights_only=weights_only)
    except OSError:  # not there, not readable
        raise
    except Exception as error:  # each format has errors of its own
        said = textwrap.shorten(str(error), 600, placeholder=" …")
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {said} Fetch or save it again.") from None
