"""Which sizes a model's forward takes, where no weight or attribute depends on the size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from timm_resize.checkpoint import meta_twin
from timm_resize.context import Context


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
    twin = meta_twin(model).eval()
    empty: list[str] = []
    for module in twin.modules():
        module.register_forward_hook(lambda m, _, out: empty.append(type(m).__name__) if _is_empty(out) else None)
    conv = next(m for m in twin.modules() if isinstance(m, nn.Conv2d))
    try:
        with torch.no_grad():
            twin(torch.empty(1, conv.in_channels, *ctx.new_size, device="meta"))
    except Exception:  # whatever a layer raises on a map that is too small for it
        empty.append("")
    if empty:
        ctx.invalid("leaves nothing of the image after the strides of the model")


def _is_empty(out: Any) -> bool:
    return isinstance(out, torch.Tensor) and out.numel() == 0
