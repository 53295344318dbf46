"""The new tensors of a plan, and the writes that put them in place."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from timm_resize.core.buffers import new_buffers
from timm_resize.core.copies import own
from timm_resize.core.history import CHAIN, HISTORY, Chain, extended, untouched
from timm_resize.core.input_check import GUARD, HOOK, check_input_size
from timm_resize.core.memory import check_memory
from timm_resize.core.plan import ResizePlan
from timm_resize.core.transaction import Transaction, Writes
from timm_resize.resample import Resample


def model_writes(root: nn.Module, plan: ResizePlan, maps: dict[nn.Parameter, Resample]) -> Writes:
    """Compute the plan's values for `root`; return the writes, and in `maps` the map of each parameter."""
    plan.check(root)
    check_memory(root, plan)
    chain, changed = Chain(getattr(root, CHAIN, {})), list[str]()
    modules = plan.modules(root)
    buffers = new_buffers(modules, plan)
    resampled = _resampled(modules, plan, chain, changed)
    writes: Writes = []
    for change in plan:
        module = modules[change.path]
        if change.kind == "parameter" and isinstance(change.how, Resample):
            param = module.get_parameter(change.name)
            maps[param] = change.how
            writes.append(partial(Transaction.parameter, param=param, new=resampled[change.key]))
        elif change.kind == "buffer":
            writes.append(partial(Transaction.buffer, module=module, name=change.name, new=buffers[change.key]))
        else:
            writes.append(partial(Transaction.attribute, owner=module, name=change.name, new=own(change.new)))
            if change.name == GUARD:
                hooks = module._forward_pre_hooks
                writes.append(partial(Transaction.item, mapping=hooks, key=HOOK, new=check_input_size))
    if any(change.name != GUARD for change in plan):  # also without a tensor: it tells that the model was resized
        events = extended(getattr(root, HISTORY, ()), plan, changed)
        writes.append(partial(Transaction.attribute, owner=root, name=CHAIN, new=chain))
        writes.append(partial(Transaction.attribute, owner=root, name=HISTORY, new=events))
    return writes


def _resampled(modules: dict[str, nn.Module], plan: ResizePlan, chain: Chain, changed: list[str]) -> dict[str, Tensor]:
    """Return the new parameters by name; updates their links in `chain`, and adds to `changed` what others wrote to.

    A tensor that nothing touched since the last resize is resampled from its original.
    """
    out: dict[str, Tensor] = {}
    for change in plan:
        how = change.how
        if change.kind != "parameter" or not isinstance(how, Resample):
            continue
        param = modules[change.path].get_parameter(change.name)
        origin, source, link = param.detach(), how.source, chain.pop(change.key, None)
        if link is not None and untouched(link["applied"], param):
            origin, source = link["origin"].to(param.device), link["source"]
            how = how.rebase(source)
        elif link is not None:
            changed.append(change.key)
        out[change.key] = new = like_parameter(how(origin), param)
        if not how.is_identity:
            kept = origin.clone() if origin.data_ptr() == param.data_ptr() else origin
            chain[change.key] = {"origin": kept, "source": source, "applied": new.clone()}
    return out


def like_parameter(new: Tensor, param: Tensor) -> Tensor:
    """Return `new` in the parameter's dtype and memory format."""
    channels_last = (
        param.dim() == 4 and not param.is_contiguous() and param.is_contiguous(memory_format=torch.channels_last)
    )
    return new.to(param.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
