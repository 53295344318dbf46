"""The new tensors of a plan, and the writes that put them in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_resize.core import caches
from timm_resize.core.buffers import new_buffers
from timm_resize.core.copies import own
from timm_resize.core.history import CHAIN, HISTORY, Chain, extended, untouched
from timm_resize.core.input_check import GUARD, HOOK, check_input_size
from timm_resize.core.memory import check_memory
from timm_resize.core.plan import CACHE, Change, ResizePlan, tensor_of
from timm_resize.core.transaction import Transaction, Writes
from timm_resize.resample import Resample


def model_writes(root: nn.Module, plan: ResizePlan, maps: dict[nn.Parameter, Resample]) -> Writes:
    """Compute the plan's values for `root`; return the writes, and in `maps` the map of each parameter."""
    plan.check(root)
    check_memory(root, plan)
    chain, changed = Chain(getattr(root, CHAIN, {})), list[str]()
    modules = plan.modules(root)
    tensors = {**new_buffers(modules, plan), **_resampled(modules, plan, chain, changed)}
    writes: Writes = []
    copies: dict[int, Any] = {}  # what a plan gives to many modules, such as a config and the parts of it, stays one
    for change in plan:
        module = modules[change.path]
        if change.kind == "parameter":
            param, new = module.get_parameter(change.name), tensors[change.key]
            assert new is not None
            if isinstance(change.how, Resample):
                maps[param] = change.how
            writes.append(partial(Transaction.parameter, param=param, new=new))
        elif change.kind == "buffer":
            writes.append(partial(Transaction.buffer, module=module, name=change.name, new=tensors[change.key]))
        else:
            writes.append(partial(Transaction.attribute, owner=module, name=change.name, new=own(change.new, copies)))
            hooks = module._forward_pre_hooks
            if change.name == GUARD:
                writes.append(partial(Transaction.item, mapping=hooks, key=HOOK, new=check_input_size))
            elif change.old is CACHE:
                of = (change.name, list[caches.Seen]())
                writes.append(partial(Transaction.attribute, owner=module, name=caches.CACHE_OF, new=of))
                writes.append(partial(Transaction.item, mapping=hooks, key=caches.HOOK, new=caches.follow_weights))
    if not all(map(is_hook, plan)):  # also without a tensor: it tells that the model was resized
        events = extended(getattr(root, HISTORY, ()), plan, changed)
        writes.append(partial(Transaction.attribute, owner=root, name=CHAIN, new=chain))
        writes.append(partial(Transaction.attribute, owner=root, name=HISTORY, new=events))
    return writes


def _resampled(modules: dict[str, nn.Module], plan: ResizePlan, chain: Chain, changed: list[str]) -> dict[str, Tensor]:
    """Return the resampled tensors by name; updates their links in `chain`, and adds to `changed` what others wrote to.

    A tensor that nothing touched since the last resize is resampled from its original.
    """
    out: dict[str, Tensor] = {}
    for change in plan:
        how = change.how
        if not isinstance(how, Resample):
            continue
        param = tensor_of(modules[change.path], change)
        assert param is not None
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


def is_hook(change: Change) -> bool:
    """Whether a change gives a module a check of its own, which is no change of size."""
    return change.name == GUARD or change.old is CACHE


def like_parameter(new: Tensor, param: Tensor) -> Tensor:
    """Return `new` in the parameter's dtype and memory format."""
    channels_last = (
        param.dim() == 4 and not param.is_contiguous() and param.is_contiguous(memory_format=torch.channels_last)
    )
    return new.to(param.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
