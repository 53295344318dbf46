"""Which sizes a model's forward takes, where no weight or attribute depends on the size."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import nn

from timm_resize.core.context import Context
from timm_resize.core.copies import meta_copy


def check_size(ctx: Context, *, minimum: int = 1, multiple: int = 1, why: str = "") -> None:
    """Refuse a size with a side below `minimum` or not divisible by `multiple` (pixels)."""
    if min(ctx.new_size) < minimum:
        ctx.invalid(f"is below the minimum of {minimum}")
    if any(side % multiple for side in ctx.new_size):
        ctx.invalid(f"is not divisible by {multiple}{', ' + why if why else ''}")


def check_small(model: nn.Module, ctx: Context, *, below: int = 64) -> None:
    """Refuse a size with a side under `below` pixels that the model's own forward cannot take.

    Run on the meta device, so no value is computed; strides, kernels and halvings decide, not a list of minima.
    """
    if model is not ctx.root or min(ctx.new_size) >= below:
        return
    with _lock:
        twin, empty, channels = _twins.get(model) or _twins.setdefault(model, _twin(model))
        empty.clear()
        try:
            with torch.no_grad():
                twin(torch.empty(1, channels, *ctx.new_size, device="meta"))
        except Exception:  # whatever a layer raises on a map that does not suit it
            empty.append("")
    if empty:
        ctx.invalid("does not come out even, or at all, after the strides of the model")


_lock = threading.Lock()


_twins: weakref.WeakKeyDictionary[nn.Module, tuple[nn.Module, list[str], int]] = weakref.WeakKeyDictionary()
"""Meta twins of models, kept while the model lives: a search for the nearest size runs many."""


def _twin(model: nn.Module) -> tuple[nn.Module, list[str], int]:
    """Return a meta twin, the list in which it reports layers with empty outputs, and its input channels."""
    twin = meta_copy(model).eval()
    empty: list[str] = []
    for module in twin.modules():
        module.register_forward_hook(lambda m, _, out: empty.append(type(m).__name__) if _is_empty(out) else None)
    conv = next(m for m in twin.modules() if isinstance(m, nn.Conv2d))
    return twin, empty, getattr(model, "in_chans", None) or conv.in_channels


def _is_empty(out: Any) -> bool:
    return isinstance(out, torch.Tensor) and out.numel() == 0
