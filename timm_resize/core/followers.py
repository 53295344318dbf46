"""What follows a model's weights through a resize: optimizer state, averaged copies, pending gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from timm_resize.core.find import find_model
from timm_resize.core.plan import MISSING, ResizePlan
from timm_resize.core.planner import plan_to
from timm_resize.core.request import ResizeOptions
from timm_resize.core.transaction import Transaction, Writes
from timm_resize.core.values import model_writes
from timm_resize.errors import ResizeError
from timm_resize.resample import Resample

T = TypeVar("T")

ParamState = Mapping[str, Any]
"""What an optimizer keeps for one parameter, by name: tensors, step counts, or anything else."""


class OptimizerLike(Protocol):
    """What is needed of an optimizer: torch's, timm's, and whatever keeps its state as they do."""

    @property
    def state(self) -> MutableMapping[Tensor, Any]:
        """Return the state of each parameter."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups, each with its parameters under "params"."""


Optimizers = OptimizerLike | Sequence[OptimizerLike]

Ema = nn.Module | Sequence[nn.Module]


def gradient_writes(maps: dict[nn.Parameter, Resample]) -> Writes:
    """Send pending gradients through the maps of their weights, as momentum goes; before, they are still there."""
    new = {p: how(p.grad) for p, how in maps.items() if p.grad is not None}
    return [partial(Transaction.gradient, param=p, new=g) for p, g in new.items()]


def several(value: T | Sequence[T] | None) -> list[T]:
    """Return one or several of something, or None, as a list."""
    return [] if value is None else list(value) if isinstance(value, Sequence) else [value]


def ema_writes(root: nn.Module, ema: nn.Module, plan: ResizePlan, options: ResizeOptions) -> Writes:
    """Compute the writes for an averaged copy, which has to be one of this model at the model's size."""
    if not isinstance(ema, nn.Module):
        kind, advice = type(ema).__name__, "Give the EMA copy itself, or a list of them: no state dict and no path."
        raise ResizeError(f"{plan.model}: ema={kind} is not a model. {advice}", model=plan.model, argument="ema")
    average = find_model(ema)
    its = plan_to(average, plan.new_size, **options)
    keys_differ = [c.key for c in its] != [c.key for c in plan]
    if type(average) is not type(root) or keys_differ or its.old_size != plan.old_size:
        raise ResizeError(
            f"{plan.model}: ema is a {its.model} at {its.old_size}, the model is at {plan.old_size}. "
            "Give the EMA copy of this model, made at its present size.",
            model=plan.model,
            argument="ema",
        )
    return model_writes(average, its, {})


def check_optimizer(optimizer: OptimizerLike, own: set[int]) -> None:
    """Raise ResizeError for what is no optimizer, or one of none of the parameters whose ids are `own`."""
    kind = type(optimizer).__name__
    if not isinstance(getattr(optimizer, "state", None), Mapping) or not hasattr(optimizer, "param_groups"):
        raise ResizeError(f"optimizer={kind} is not an optimizer. Give one, or a list of them.", argument="optimizer")
    if not any(id(param) in own for group in optimizer.param_groups for param in group["params"]):
        text = f"optimizer={kind} holds none of the model's parameters. Give the optimizer of this model."
        raise ResizeError(text, argument="optimizer")


def optimizer_writes(
    optimizer: OptimizerLike, maps: dict[nn.Parameter, Resample], names: dict[int, str]
) -> tuple[Writes, list[str]]:
    """Compute an optimizer's state for resampled parameters; return the writes, and remarks for the user.

    Every tensor of the parameter's shape goes through the parameter's own map, or, where it has no negative entry
    (second moments), through `Resample.second_moment`, which keeps it non-negative. Step counts and other scalars
    stay. An optimizer that keeps state of other shapes (factored, or matrices over the axes) chooses by the shape what
    it keeps, and no map of the parameter is one of that state: the resampled parameters start afresh at its next
    step, and a remark says so.

    Args:
        optimizer: Its `state` is written to when the writes are performed.
        maps: The map of each resampled parameter, before the parameters are written.
        names: Name of each parameter by id, for the remarks.
    """
    kind = type(optimizer).__name__
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
            remarks.append(f"{kind} state of {name} starts afresh: its {', '.join(odd)} cannot be resampled.")
            writes.append(partial(Transaction.item, mapping=states, key=param, new=MISSING))
            continue
        for key, value in mapped_state(state, param.shape, how).items():
            writes.append(partial(Transaction.item, mapping=state, key=key, new=value))
    return writes, remarks


def state_bytes(optimizer: OptimizerLike, maps: dict[nn.Parameter, Resample]) -> dict[torch.device, int]:
    """Return the bytes that an optimizer's state for resampled parameters is going to take, per device."""
    out: dict[torch.device, int] = {}
    for param, how in maps.items():
        count = math.prod(how.shape(param.shape))
        for value in (optimizer.state.get(param) or {}).values():
            if isinstance(value, Tensor) and value.shape == param.shape:
                out[value.device] = out.get(value.device, 0) + count * value.element_size()
    return out


def misshapen(state: ParamState, shape: Sequence[int]) -> list[str]:
    """Return the names of tensors in a parameter's state that are neither scalars nor of its shape."""
    flat = [(k, v) for k, values in state.items() for v in (values if isinstance(values, (list, tuple)) else (values,))]
    return sorted({k for k, v in flat if isinstance(v, Tensor) and v.numel() > 1 and v.shape != torch.Size(shape)})


def mapped_state(state: ParamState, shape: Sequence[int], how: Resample) -> dict[str, Tensor]:
    """Return the resampled tensors of a parameter's state by name."""
    out = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == torch.Size(shape):
            signed = value.is_meta or bool((value < 0).any())
            out[key] = how(value) if signed else how.second_moment(value)
    return out
