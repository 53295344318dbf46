"""MViTv2: decomposed relative positions between pooled queries and pooled keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from timm.models.mvitv2 import MultiScaleAttention, MultiScaleAttentionPoolFirst, MultiScaleVit
from torch import Tensor, nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size, times
from timm_resize.handlers.layers.conv_size import map_size
from timm_resize.resample import AxisMap, Resample
from timm_resize.resample.sampling import sample_matrix


@register(
    MultiScaleVit,
    state="rel_pos_h, rel_pos_w (2*max(query, key) - 1, dim) per block",
    method="linear in the offset as a share of the image, offset 0 kept at its row",
    sizes="any, square or not",
    guarded=True,
    examples={"mvitv2_tiny": {}, "mvitv2_small_cls": {}},
)
def plan_mvitv2(model: MultiScaleVit, ctx: Context) -> Changes:
    """Follow the grid through every block as forward makes it: patches and pools round up, the constructor down."""
    stages = ctx.sequence(model, "stages")
    stride = _stride(stages[0].blocks[0].attn.pool_q)
    old = times(stages[0].feat_size, stride)
    grid = map_size(model.patch_embed.proj, ctx.new_size)
    yield from ctx.parameter(model, "pos_embed", ctx.pos_embed(old, grid, model.num_prefix_tokens), optional=True)
    yield from ctx.guard(model.patch_embed.proj, partial(map_size, model.patch_embed.proj))
    for stage in stages:
        for block in stage.blocks:
            grid = yield from ctx.visit(block.attn, feat_size=grid)
        yield from ctx.attribute(stage, feat_size=grid)


@register(
    MultiScaleAttention,
    MultiScaleAttentionPoolFirst,
    state="rel_pos_h, rel_pos_w (2*max(query, key) - 1, dim)",
    method="linear, offset 0 kept",
)
def plan_multi_scale_attention(
    attention: MultiScaleAttention | MultiScaleAttentionPoolFirst, ctx: Context, *, feat_size: Size
) -> Changes:
    """Resample both tables for a map of `feat_size` at the block's input; returns the size of the pooled queries."""
    query, key = map_size(attention.pool_q, feat_size), map_size(attention.pool_k, feat_size)
    if attention.rel_pos_type == "spatial":
        old_query, old_key = _old_sizes(attention)
        for axis, name in enumerate(("rel_pos_h", "rel_pos_w")):
            old, new = _table(old_query[axis], old_key[axis]), _table(query[axis], key[axis])
            how = QueryKeyOffset(old[0], new[0], *old[1:], new_zero=new[1], **ctx.interpolation(mode="bilinear"))
            yield from ctx.parameter(attention, name, Resample((how,)))
    return query


def _old_sizes(attention: MultiScaleAttention | MultiScaleAttentionPoolFirst) -> tuple[Size, Size]:
    """Return the sizes of queries and keys that the tables were made for.

    The longer of the two is in the table's length; the other follows from the strides.
    """
    strides = zip(_stride(attention.pool_q), _stride(attention.pool_k), strict=True)
    h, w = (
        (table.shape[0] + 1) // 2 * min(both)
        for table, both in zip((attention.rel_pos_h, attention.rel_pos_w), strides, strict=True)
    )
    return map_size(attention.pool_q, (h, w)), map_size(attention.pool_k, (h, w))


def _stride(pool: nn.Conv2d | None) -> Size:
    return (1, 1) if pool is None else (pool.stride[0], pool.stride[1])


def _table(query: int, key: int) -> tuple[int, int, int]:
    """Return the table's rows, the row that forward reads at offset 0, and the last row that it reads.

    Forward reads row int(i * max(k/q, 1) + (k - 1 - j) * max(q/k, 1)) for query i and key j. So offset 0 is the
    table's centre only where both sizes agree, and rows past the last one never get a gradient.

    Source: MViTv2, arXiv 2112.01526, equation 4; timm.models.mvitv2.cal_rel_pos_type.
    """
    by_query, by_key = max(key / query, 1.0), max(query / key, 1.0)
    return 2 * max(query, key) - 1, int((key - 1) * by_key), int((query - 1) * by_query + (key - 1) * by_key)


@dataclass(frozen=True)
class QueryKeyOffset(AxisMap):
    """A table over query minus key offsets in cells of the finer of both grids, shifted so that row 0 is the lowest.

    An offset is kept as a share of the image: rows p' of the new table read the old one at
    (p' - new_zero) * span_old / span_new + old_zero, and never past the last row that was trained.

    Attributes:
        old_zero: Row of offset 0 in the old table.
        old_last: Last row of the old table that forward reads.
        new_zero: Row of offset 0 in the new table.
    """

    LABEL = "{mode}, offset 0 kept"
    OLD_SIDE = ("old", "old_zero", "old_last")

    old_zero: int
    old_last: int
    new_zero: int
    mode: str = "bilinear"
    antialias: bool = True

    @property
    def is_identity(self) -> bool:
        """Whether both tables have the same rows with offset 0 at the same one."""
        return self.old == self.new and self.old_zero == self.new_zero

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        scale = (self.old + 1) / (self.new + 1)  # spans: a table of n rows covers offsets of (n + 1) / 2 cells
        rows = torch.arange(self.new, dtype=torch.float64)
        positions = ((rows - self.new_zero) * scale + self.old_zero).clamp(0, self.old_last)
        edge = torch.minimum(positions, self.old_last - positions)  # a kernel cut on one side would shift the row
        used = sample_matrix(
            positions, self.old_last + 1, spacing=edge.clamp(max=scale), mode=self.mode, antialias=self.antialias
        )
        matrix = torch.zeros(self.new, self.old, dtype=torch.float64)
        matrix[:, : self.old_last + 1] = used
        matrix[self.new_zero] = 0.0
        matrix[self.new_zero, self.old_zero] = 1.0  # also when a widened kernel would blur it
        return matrix
