"""TNT, legacy or not: a position embedding per patch; the one inside a patch does not depend on the size."""

from __future__ import annotations

from timm.models.tnt import TNT, PixelEmbed

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import ceil_div, floor_div, text


@register(
    TNT,
    state="patch_pos (1, 1 + h*w, dim)",
    method="bicubic antialias; class token kept",
    sizes="at least one patch; dropped pixels warned of; legacy: not 13 to 15 pixels past a multiple of 16",
    examples={
        "tnt_s_patch16_224": {"depth": 1, "embed_dim": 96, "inner_dim": 8},
        "tnt_s_legacy_patch16_224": {"depth": 1, "embed_dim": 96, "inner_dim": 8},
    },
)
def plan_tnt(model: TNT, ctx: Context) -> Changes:
    """Resample the position embedding of the patches from the old grid to the new."""
    old, new = yield from ctx.visit(model.pixel_embed)
    yield from ctx.parameter(model, "patch_pos", ctx.pos_embed(old, new, prefix=1))
    yield from ctx.attribute(model, num_patches=new[0] * new[1])


@register(PixelEmbed, state="img_size, grid_size, num_patches", sizes="floored to the patch; dropped pixels warned of")
def plan_pixel_embed(embed: PixelEmbed, ctx: Context) -> Changes:
    """Set the sizes; returns the old grid and the new one.

    The legacy kind cuts patches from the strided map, whose sides are rounded up, so a few sizes give forward one
    patch more than `dynamic_feat_size` counts: features could not be put back into a map.
    """
    patch = tuple(embed.patch_size)
    grid = floor_div(ctx.new_size, patch)
    if min(grid) < 1:
        ctx.invalid(f"is smaller than patch_size={patch[0] if patch[0] == patch[1] else patch}")
    if embed.legacy:
        cut = floor_div(ceil_div(ctx.new_size, tuple(embed.proj.stride)), tuple(embed.new_patch_size))
        if cut != grid:
            ctx.invalid(f"is cut into {text(cut)} patches (the legacy stem rounds up) but counted as {text(grid)}")
    rest = (ctx.new_size[0] - grid[0] * patch[0], ctx.new_size[1] - grid[1] * patch[1])
    if any(rest):
        ctx.warn(
            f"img_size={ctx.new_size} drops {rest[0]} rows and {rest[1]} columns of pixels at the "
            f"bottom and right: patches take {text(patch)}."
        )
    old = tuple(embed.grid_size)
    yield from ctx.attribute(embed, img_size=ctx.new_size, grid_size=grid, num_patches=grid[0] * grid[1])
    return old, grid
