"""The new buffers of a plan: computed beside the model, which stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import cast

import torch
from torch import Tensor, nn

from timm_resize.core.copies import own, shallow_copy
from timm_resize.core.plan import Change, Rebuild, Reinitialise, ResizePlan, shape_of
from timm_resize.core.transaction import set_attribute
from timm_resize.errors import UnsupportedModelError
from timm_resize.resample import Resample

Key = tuple[Callable[..., Tensor], tuple[Hashable, ...], torch.device, torch.dtype]


def new_buffers(modules: dict[str, nn.Module], plan: ResizePlan) -> dict[str, Tensor | None]:
    """Compute every rebuilt tensor of the plan's `modules`, by path; equal rebuilds are computed once.

    Those that no state dict holds then share their memory: nothing of stock's writes to one. The others are copied,
    as files of tensors that share memory cannot be saved.
    """
    out: dict[str, Tensor | None] = {}
    built: dict[Key, Tensor] = {}
    filled: dict[str, nn.Module] = {}
    for change in plan:
        if change.kind == "attribute" or isinstance(change.how, Resample):
            continue
        if isinstance(change.how, Reinitialise):
            if change.path not in filled:
                filled[change.path] = _reinitialised(modules[change.path], change.path, plan)
            out[change.key] = filled[change.path]._buffers[change.name]
        elif isinstance(change.how, Rebuild):
            out[change.key] = _rebuilt(modules[change.path], change, change.how, built)
        else:
            out[change.key] = None
        if shape_of(out[change.key]) != change.new:
            raise UnsupportedModelError(_misfit(modules[change.path], change, plan, out[change.key]))
    return out


def _misfit(module: nn.Module, change: Change, plan: ResizePlan, made: Tensor | None) -> str:
    rule = (
        f"its Rebuild({change.how.fn.__name__}, {change.how.args})" if isinstance(change.how, Rebuild) else "its class"
    )
    return (
        f"{plan.model}: {change.key} of {type(module).__name__} is planned as {change.new}, and {rule} makes it "
        f"{shape_of(made)}. Give ctx.buffer the shape that the rule makes, or the rule the arguments for that shape."
    )


def _rebuilt(module: nn.Module, change: Change, how: Rebuild, built: dict[Key, Tensor]) -> Tensor:
    like = _like(module, how.like or change.name)
    key = (how.fn, how.args, like.device, like.dtype)
    if key not in built:
        built[key] = how.fn(*how.args, device=like.device, dtype=like.dtype)
    return built[key].detach() if change.name in module._non_persistent_buffers_set else built[key].clone()


def _like(module: nn.Module, name: str) -> Tensor:
    """Return a tensor of the module, or, where the layer that had it is wrapped or gone, another near its place."""
    path, _, name = name.rpartition(".")
    owner = module.get_submodule(path)
    if path and not hasattr(owner, name):
        return next(p for near in (owner, module) for p in near.parameters() if p.is_floating_point())
    tensor: Tensor = getattr(owner, name)
    return tensor


def _reinitialised(module: nn.Module, path: str, plan: ResizePlan) -> nn.Module:
    """Return a shallow copy of `module` with its new attributes and freshly initialised buffers."""
    out = shallow_copy(module)
    for name, tensor in module._buffers.items():  # its initialiser refills all, also those that do not change
        out._buffers[name] = None if tensor is None else tensor.clone()
    for change in plan:
        if change.path != path:
            continue
        if change.kind == "attribute":
            set_attribute(out, change.name, own(change.new))
        elif change.kind == "buffer" and isinstance(change.how, Reinitialise) and change.new is not None:
            old = module._buffers[change.name]
            assert old is not None
            out._buffers[change.name] = torch.empty(change.new, dtype=old.dtype, device=old.device)
    cast(Callable[[], None], out.init_non_persistent_buffers)()
    return out
