"""Visformer: a position embedding map before each of its three stages."""

from __future__ import annotations

from timm.models.visformer import Visformer

from timm_resize.core.context import Changes, Context, Grids
from timm_resize.core.registry import register
from timm_resize.geometry import floor_div, left_over, text, times
from timm_resize.handlers.layers.conv_size import map_size


@register(
    Visformer,
    state="pos_embed1..3 (1, dim, h, w)",
    method="bicubic antialias",
    sizes="at least 32; dropped pixels warned of",
    examples={"visformer_tiny": {"depth": (1, 1, 1), "embed_dim": 96}},
)
def plan_visformer(model: Visformer, ctx: Context) -> Changes:
    """Resample each stage's map to the grid that forward makes: the stem rounds up, the patch embeddings down.

    Stock's constructor rounds the stem down as well, and fails at an odd size.
    """
    size, cell = ctx.new_size, (1, 1)
    if model.stem is not None:
        cell = tuple(model.stem[0].stride)
        size = map_size(model.stem, size)
        if size != floor_div(ctx.new_size, cell):
            ctx.warn(
                f"img_size={ctx.new_size} is odd: stock timm's constructor rounds the stem's map down, so a "
                "checkpoint saved at this size needs timm_resize."
            )
    for number in (1, 2, 3):
        embed = getattr(model, f"patch_embed{number}")
        if embed is None:
            continue  # the stage shares the grid of the one before, or was pruned
        cell = times(cell, tuple(embed.patch_size))
        if min(floor_div(ctx.new_size, cell)) < 1:
            ctx.invalid(f"is smaller than one cell of stage {number}, which takes {text(cell)} pixels")
        size = (yield from ctx.visit(embed, Grids, given=size)).new
        table = getattr(model, f"pos_embed{number}")
        if table is not None:
            old = (table.shape[2], table.shape[3])
            yield from ctx.parameter(model, f"pos_embed{number}", ctx.pos_embed_map(old, size, dim=2))
    yield from ctx.attribute(model, img_size=ctx.new_size)
    ctx.warn_dropped(left_over(ctx.new_size, times(size, cell)), f"the cells of the last stage take {text(cell)}")
