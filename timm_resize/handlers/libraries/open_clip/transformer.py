"""open_clip's ViT: the image tower of CLIP, SigLIP and CoCa."""

from __future__ import annotations

from open_clip.transformer import VisionTransformer

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import floor_div, left_over, times
from timm_resize.handlers.layers.patch_embed import SIZES
from timm_resize.handlers.libraries.open_clip.towers import image_size, record_size


@register(
    VisionTransformer,
    state="positional_embedding (1 + h*w, dim)",
    method="bicubic antialias; class token kept",
    sizes=SIZES,
    guarded=True,
    size=image_size,
)
def plan_vision_transformer(model: VisionTransformer, ctx: Context) -> Changes:
    """Resample the positions as open_clip does when it loads with `force_image_size`: as timm does, sin-cos ones too.

    Forward adds them without a look at the grid, so the patches' convolution checks it.

    Source: open_clip/model.py, resize_pos_embed.
    """
    patch = tuple(model.patch_size)
    grid = floor_div(ctx.new_size, patch)
    if min(grid) < 1:
        ctx.invalid(f"is smaller than patch_size={patch}")
    ctx.warn_dropped(left_over(ctx.new_size, times(grid, patch)), f"patch_size={patch}")
    how = ctx.pos_embed(tuple(model.grid_size), grid, prefix=1, dim=0)
    yield from ctx.parameter(model, "positional_embedding", how)
    yield from ctx.attribute(model, grid_size=grid)
    yield from ctx.guard(model.conv1, lambda size: floor_div(size, patch))
    yield from record_size(model, ctx)
