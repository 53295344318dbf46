"""The new tensors of a plan, and the writes that put them in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from timm_resize.core.buffers import new_buffers
from timm_resize.core.copies import own
from timm_resize.core.history import CHAIN, HISTORY, extended, untouched
from timm_resize.core.input_check import GUARD, HOOK, check_input_size
from timm_resize.core.memory import check_memory
from timm_resize.core.plan import ResizePlan
from timm_resize.core.transaction import Writes
from timm_resize.resample import Resample, serial


def model_writes(root: nn.Module, plan: ResizePlan, maps: dict[nn.Parameter, Resample]) -> Writes:
    """Compute the plan's values for `root`; return the writes, and in `maps` the map of each parameter."""
    plan.check(root)
    check_memory(root, plan)
    chain, changed = dict(getattr(root, CHAIN, {})), list[str]()
    modules = plan.modules(root)
    buffers = new_buffers(modules, plan)
    resampled = _resampled(modules, plan, chain, changed)
    writes: Writes = []
    for change in plan:
        module = modules[change.path]
        if change.kind == "parameter" and isinstance(change.how, Resample):
            param = module._parameters[change.name]
            assert param is not None
            new, maps[param] = resampled[change.key], change.how
            writes.append(lambda t, p=param, n=new: t.parameter(p, n))  # type: ignore[misc]
        elif change.kind == "buffer":
            value = buffers[change.key]
            writes.append(lambda t, m=module, n=change.name, v=value: t.buffer(m, n, v))  # type: ignore[misc]
        else:
            value = own(change.new)
            writes.append(lambda t, m=module, n=change.name, v=value: t.attribute(m, n, v))  # type: ignore[misc]
            if change.name == GUARD:
                hooks = module._forward_pre_hooks
                writes.append(lambda t, h=hooks: t.item(h, HOOK, check_input_size))  # type: ignore[misc]
    if any(change.name != GUARD for change in plan):  # also without a tensor: it tells that the model was resized
        events = extended(getattr(root, HISTORY, ()), plan, changed)
        writes.append(lambda t: t.attribute(root, CHAIN, chain))
        writes.append(lambda t: t.attribute(root, HISTORY, events))
    return writes


def _resampled(
    modules: dict[str, Any], plan: ResizePlan, chain: dict[str, Any], changed: list[str]
) -> dict[str, Tensor]:
    """Return the new parameters, equal maps of equal shapes done together; updates their links in `chain`.

    A tensor that nothing touched since the last resize is resampled from its original.
    """
    groups: dict[Any, list[tuple[str, nn.Parameter, Tensor, Any]]] = {}
    for change in plan:
        how = change.how
        if change.kind != "parameter" or not isinstance(how, Resample):
            continue
        param = modules[change.path]._parameters[change.name]
        origin, source, link = param.detach(), how.source, chain.pop(change.key, None)
        if link is not None and untouched(link["applied"], param):
            origin, source = link["origin"].to(param.device), link["source"]
            how = how.rebase(source)
        elif link is not None:
            changed.append(change.key)
        groups.setdefault((how, origin.shape, origin.dtype, origin.device), []).append(
            (change.key, param, origin, source)
        )
    out: dict[str, Tensor] = {}
    for (how, *_), members in groups.items():
        for (key, param, origin, source), value in zip(members, how.each([m[2] for m in members]), strict=True):
            out[key] = new = like_parameter(value, param)
            if not how.is_identity:
                kept = serial.copied(origin) if origin.data_ptr() == param.data_ptr() else origin
                chain[key] = {"origin": kept, "source": source, "applied": serial.copied(new)}
    return out


def like_parameter(new: Tensor, param: Tensor) -> Tensor:
    """Return `new` in the parameter's dtype and memory format."""
    channels_last = (
        param.dim() == 4 and not param.is_contiguous() and param.is_contiguous(memory_format=torch.channels_last)
    )
    return new.to(param.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
