"""State dicts of one size into models of another."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from timm.models import _helpers
from torch import Tensor, nn

from timm_resize.apply import apply_plan
from timm_resize.context import Invalid
from timm_resize.errors import CheckpointError, ResizeError
from timm_resize.geometry import parse_size, text
from timm_resize.locate import current_size, find_model
from timm_resize.planner import make_request, plan_request
from timm_resize.resample import Resample

_stock_load_checkpoint = _helpers.load_checkpoint


def resize_state_dict(state_dict: dict[str, Tensor], model: nn.Module, *, source: Any = None, **options: Any) -> dict[str, Tensor]:
    """Fit a checkpoint saved at one image size to a model at another.

    Args:
        state_dict: Tensors by timm's names. Not changed.
        model: The model that will load them, at its own size.
        source: Image size (H, W) of the checkpoint. By default the model's present size or the one in its
            `pretrained_cfg`, whichever the tensors' shapes fit.
        **options: As for `plan_resize`.

    Returns:
        A new dict; tensors that do not depend on the size are the same objects.

    Raises:
        CheckpointError: The tensors fit no size that is known; give `source`.
    """
    root = find_model(model)
    name, target = type(root).__name__, current_size(root)
    shapes = {k: tuple(v.shape) for k, v in root.state_dict().items()}
    if source is None and _fits(shapes, state_dict) is None:
        return dict(state_dict)
    config = (getattr(root, "pretrained_cfg", None) or {}).get("input_size") or ()
    candidates = [parse_size(source, "source", name)] if source is not None else [tuple(config[1:])] * bool(config)
    misfit = ""
    for size in candidates:
        twin = meta_twin(root)
        try:
            apply_plan(twin, plan_request(twin, make_request(name, size, constructing=True)))
        except (ResizeError, Invalid) as error:
            misfit = str(error)
            continue
        misfit = _fits({k: tuple(v.shape) for k, v in twin.state_dict().items()}, state_dict) or ""
        if not misfit:
            plan = plan_request(twin, make_request(name, target, **options))
            maps = {c.key: c.how for c in plan if isinstance(c.how, Resample)}
            return {k: maps[k](v) if k in maps else v for k, v in state_dict.items()}
    tried = " or ".join(text(c) for c in candidates) or "no size"
    raise CheckpointError(
        f"{name}: the checkpoint fits neither the model's {target} nor {tried}: {misfit}. "
        "Give source=(height, width), the image size it was saved at."
    )


def _fits(shapes: dict[str, tuple[int, ...]], state_dict: dict[str, Any]) -> str | None:
    """Return the first tensor whose shape differs, as text; None when all that both have agree."""
    for key, tensor in state_dict.items():
        if key in shapes and isinstance(tensor, Tensor) and tuple(tensor.shape) != shapes[key]:
            return f"{key} is {tuple(tensor.shape)}, not {shapes[key]}"
    return None


def meta_twin(model: nn.Module) -> nn.Module:
    """Copy a model's structure onto the meta device without copying its weights."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def load_checkpoint(model: nn.Module, checkpoint_path: str, use_ema: bool = True, device: Any = "cpu",
                    strict: bool = True, remap: bool = False, filter_fn: Any = None,
                    weights_only: bool = True) -> Any:  # fmt: skip
    """As `timm.models.load_checkpoint`, for a checkpoint of another image size too."""
    path = str(checkpoint_path)
    if remap or os.path.splitext(path)[-1].lower() in (".npz", ".npy"):
        return _stock_load_checkpoint(model, path, use_ema, device, strict, remap, filter_fn, weights_only)
    state_dict = _helpers.load_state_dict(path, use_ema, device=device, weights_only=weights_only)
    if filter_fn:
        state_dict = filter_fn(state_dict, model)
    return model.load_state_dict(resize_state_dict(state_dict, model), strict=strict)
