"""Visformer: a position embedding map before each of its three stages."""

from __future__ import annotations

from timm.models.visformer import Visformer

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import ceil_div, floor_div, text


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
        size = ceil_div(size, cell)
        if size != floor_div(ctx.new_size, cell):
            ctx.warn(
                f"img_size={ctx.new_size} is odd: stock timm's constructor rounds the stem's map down, so a "
                "checkpoint saved at this size needs timm_resize."
            )
    for number in (1, 2, 3):
        embed = getattr(model, f"patch_embed{number}")
        if embed is None:
            continue  # the stage shares the grid of the one before, or was pruned
        patch = tuple(embed.patch_size)
        cell = (cell[0] * patch[0], cell[1] * patch[1])
        if min(floor_div(ctx.new_size, cell)) < 1:
            ctx.invalid(f"is smaller than one cell of stage {number}, which takes {text(cell)} pixels")
        grid = floor_div(size, patch)
        ctx._visited.add(id(embed))  # its input is a map, not the image that its own handler assumes
        yield from ctx.attribute(embed, img_size=size, grid_size=grid, num_patches=grid[0] * grid[1])
        table = getattr(model, f"pos_embed{number}")
        if table is not None:
            old = (table.shape[2], table.shape[3])
            yield from ctx.parameter(model, f"pos_embed{number}", ctx.pos_embed_map(old, grid, dim=2))
        size = grid
    yield from ctx.attribute(model, img_size=ctx.new_size)
    rest = (max(ctx.new_size[0] - size[0] * cell[0], 0), max(ctx.new_size[1] - size[1] * cell[1], 0))
    if any(rest):
        ctx.warn(
            f"img_size={ctx.new_size} leaves the last {rest[0]} rows and {rest[1]} columns of pixels out of "
            f"the last stage, whose cells take {text(cell)}."
        )
