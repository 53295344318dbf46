"""Attention biases over absolute offsets, as in LeViT: shared by the EfficientFormers and TinyViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_resize.core.context import Changes, Context, Rebuild
from timm_resize.geometry import Size, ceil_div


def resize_offset_bias(attention: nn.Module, ctx: Context, old: Size, new: Size, *, step: int = 1) -> Changes:
    """Resample `attention_biases` (heads, h*w) over (|dy|, |dx|), rebuild its index, drop what is cached from it.

    Args:
        attention: Holds `attention_biases`, `attention_bias_idxs` and `attention_bias_cache`; the sizes of keys and
            queries and their counts are set where it records them.
        old: Map (h, w) of keys that the table was made for.
        new: Map (h, w) of keys wanted.
        step: Queries are the cells 0, step, 2*step … of each axis.
    """
    if old != new:
        yield from ctx.parameter(attention, "attention_biases", ctx.offset_table(old, new))
        queries, keys = ceil_div(new, step), new[0] * new[1]
        rule = Rebuild(offset_index, (new, step))
        yield from ctx.buffer(attention, "attention_bias_idxs", (queries[0] * queries[1], keys), rule)
        records = {"resolution": new, "resolution2": queries, "N": keys, "N2": queries[0] * queries[1]}
        yield from ctx.attribute(attention, **{k: v for k, v in records.items() if hasattr(attention, k)})
    yield from ctx.attribute(attention, attention_bias_cache={})


def offset_index(size: Size, step: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the table entry |dy| * w + |dx| of every (query, key) pair of a map (h, w), both row-major."""
    rows = (torch.arange(0, size[0], step, device=device)[:, None] - torch.arange(size[0], device=device)).abs()
    columns = (torch.arange(0, size[1], step, device=device)[:, None] - torch.arange(size[1], device=device)).abs()
    pairs = rows[:, None, :, None] * size[1] + columns[None, :, None, :]  # (query y, x, key y, x)
    return pairs.reshape(rows.shape[0] * columns.shape[0], -1).to(dtype)
