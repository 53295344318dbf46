"""The new buffers of a plan: computed beside the model, which stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from timm_resize.core.copies import own, shallow_copy
from timm_resize.core.plan import Change, Rebuild, Reinitialise, ResizePlan, shape_of
from timm_resize.core.transaction import set_attribute


def new_buffers(modules: dict[str, Any], plan: ResizePlan) -> dict[str, Tensor | None]:
    """Compute every new buffer of the plan's `modules`, by path; equal rebuilds are computed once.

    Those that no state dict holds then share their memory: nothing of stock's writes to one. The others are copied,
    as files of tensors that share memory cannot be saved.
    """
    out: dict[str, Tensor | None] = {}
    built: dict[Any, Tensor] = {}
    shadows: dict[str, nn.Module] = {}
    for change in plan:
        if change.kind != "buffer":
            continue
        if isinstance(change.how, Reinitialise):
            if change.path not in shadows:
                shadows[change.path] = _reinitialised(modules[change.path], change.path, plan)
            out[change.key] = shadows[change.path]._buffers[change.name]
        elif isinstance(change.how, Rebuild):
            out[change.key] = _rebuilt(modules[change.path], change, change.how, built)
        else:
            out[change.key] = None
        if shape_of(out[change.key]) != change.new:
            raise AssertionError(f"{change.key}: {shape_of(out[change.key])} instead of {change.new}")
    return out


def _rebuilt(module: nn.Module, change: Change, how: Rebuild, built: dict[Any, Tensor]) -> Tensor:
    like: Any = module._buffers.get(change.name)
    if how.like:
        path, _, name = how.like.rpartition(".")
        like = getattr(module.get_submodule(path), name)
    key = (how.fn, how.args, like.device, like.dtype)
    if key not in built:
        built[key] = how.fn(*how.args, device=like.device, dtype=like.dtype)
    return built[key].detach() if change.name in module._non_persistent_buffers_set else built[key].clone()


def _reinitialised(module: nn.Module, path: str, plan: ResizePlan) -> nn.Module:
    """Return a shallow twin of `module` with its new attributes and freshly initialised buffers."""
    twin = shallow_copy(module)
    for name, tensor in module._buffers.items():  # its initialiser refills all, also those that do not change
        twin._buffers[name] = None if tensor is None else tensor.clone()
    for change in plan:
        if change.path != path:
            continue
        if change.kind == "attribute":
            set_attribute(twin, change.name, own(change.new))
        elif change.kind == "buffer" and isinstance(change.how, Reinitialise) and change.new is not None:
            old = module._buffers[change.name]
            assert old is not None
            twin._buffers[change.name] = torch.empty(change.new, dtype=old.dtype, device=old.device)
    twin.init_non_persistent_buffers()
    return twin
