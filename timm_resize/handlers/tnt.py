"""TNT, legacy or not: a position embedding per patch; the one inside a patch does not depend on the size."""

from __future__ import annotations

from timm.models.tnt import TNT, PixelEmbed

from timm_resize.core.context import Changes, Context, Grids, Returning
from timm_resize.core.registry import register
from timm_resize.geometry import ceil_div, floor_div, text
from timm_resize.handlers.layers.patch_embed import FLOORED, RECORDS, plan_patch_embed


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
    grids = yield from ctx.visit(model.pixel_embed, Grids)
    yield from ctx.parameter(model, "patch_pos", ctx.pos_embed(grids.old, grids.new, prefix=1))
    yield from ctx.attribute(model, num_patches=grids.new[0] * grids.new[1])


@register(PixelEmbed, state=RECORDS, sizes=FLOORED)
def plan_pixel_embed(embed: PixelEmbed, ctx: Context) -> Returning[Grids]:
    """Set the sizes, as for timm's `PatchEmbed`, whose attributes this one has.

    The legacy kind cuts patches from the strided map, whose sides are rounded up, so a few sizes give forward one
    patch more than `dynamic_feat_size` counts: features could not be put back into a map.
    """
    grids = yield from plan_patch_embed(embed, ctx)
    if embed.legacy:
        cut = floor_div(ceil_div(ctx.new_size, tuple(embed.proj.stride)), tuple(embed.new_patch_size))
        if cut != grids.new:
            ctx.invalid(f"is cut into {text(cut)} patches (the legacy stem rounds up) but counted as {text(grids.new)}")
    return grids
