"""What follows a model's weights through a resize: optimizer state, averaged copies, pending gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_resize.core.find import find_model
from timm_resize.core.plan import MISSING, ResizePlan
from timm_resize.core.planner import plan_request
from timm_resize.core.request import make_request
from timm_resize.core.transaction import Writes
from timm_resize.core.values import model_writes
from timm_resize.errors import ResizeError
from timm_resize.resample import Resample


def gradient_writes(maps: dict[nn.Parameter, Resample]) -> Writes:
    """Send pending gradients through the maps of their weights, as momentum goes; before, they are still there."""
    new = {p: how(p.grad) for p, how in maps.items() if p.grad is not None}
    return [lambda t, p=p, g=g: t.gradient(p, g) for p, g in new.items()]  # type: ignore[misc]


def several(value: Any) -> list[Any]:
    """Return one or several of something, or None, as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def ema_writes(root: nn.Module, ema: nn.Module, plan: ResizePlan, options: dict[str, Any]) -> Writes:
    """Compute the writes for an averaged copy, which has to be one of this model at the model's size."""
    copy_ = find_model(ema)
    request = make_request(type(copy_).__name__, plan.new_size, **options)
    twin = plan_request(copy_, request)
    if (
        type(copy_) is not type(root)
        or [c.key for c in twin] != [c.key for c in plan]
        or twin.old_size != plan.old_size
    ):
        raise ResizeError(
            f"{plan.model}: ema is a {twin.model} at {twin.old_size}, the model is at {plan.old_size}. "
            "Give the EMA copy of this model, made at its present size."
        )
    return model_writes(copy_, twin, {})


def optimizer_writes(
    optimizer: Any, maps: dict[nn.Parameter, Resample], names: dict[int, str]
) -> tuple[Writes, list[str]]:
    """Compute an optimizer's state for resampled parameters; return the writes, and remarks for the user.

    Every tensor of the parameter's shape goes through the parameter's own map, or, where it has no negative entry
    (second moments), through `Resample.second_moment`, which keeps it non-negative. Step counts and other scalars
    stay. An optimizer that keeps state of other shapes (factored, or matrices over the axes) chooses by the shape what
    it keeps, and no map of the parameter is one of that state: the resampled parameters start afresh at its next
    step, and a remark says so.

    Args:
        optimizer: A `torch.optim.Optimizer`, or anything with a `state` mapping per parameter.
        maps: The map of each resampled parameter, before the parameters are written.
        names: Name of each parameter by id, for the remarks.
    """
    writes: Writes = []
    remarks: list[str] = []
    states = optimizer.state
    odd = sorted(
        {name for param, state in states.items() if isinstance(param, Tensor) for name in misshapen(state, param.shape)}
    )
    for param, how in maps.items():
        state = states.get(param) or {}
        if odd and state:
            name = names.get(id(param), "a parameter")
            kind = type(optimizer).__name__
            remarks.append(f"{kind} state of {name} starts afresh: its {', '.join(odd)} cannot be resampled.")
            writes.append(lambda t, p=param: t.item(states, p, MISSING))  # type: ignore[misc]
            continue
        for key, value in mapped_state(state, param.shape, how).items():
            writes.append(lambda t, s=state, k=key, v=value: t.item(s, k, v))  # type: ignore[misc]
    return writes, remarks


def misshapen(state: dict[str, Any], shape: Sequence[int]) -> list[str]:
    """Return the names of tensors in a parameter's state that are neither scalars nor of its shape."""
    flat = [(k, v) for k, values in state.items() for v in (values if isinstance(values, (list, tuple)) else (values,))]
    return sorted({k for k, v in flat if isinstance(v, Tensor) and v.numel() > 1 and v.shape != torch.Size(shape)})


def mapped_state(state: dict[str, Any], shape: Sequence[int], how: Resample) -> dict[str, Tensor]:
    """Return the resampled tensors of a parameter's state by name."""
    out = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == torch.Size(shape):
            signed = value.is_meta or bool((value < 0).any())
            out[key] = how(value) if signed else how.second_moment(value)
    return out
