"""open_clip's ModifiedResNet: CLIP's convolutional image towers, which end in an attention pool."""

from __future__ import annotations

from open_clip.modified_resnet import ModifiedResNet

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size, ceil_div, floor_div, left_over, times
from timm_resize.handlers.libraries.open_clip.towers import image_size, record_size


def last_map(size: Size) -> Size:
    """Return the map (h, w) of an image: the stem's first convolution rounds up, the four pools round down."""
    return floor_div(ceil_div(size, 2), 16)


@register(
    ModifiedResNet,
    state="attnpool.positional_embedding (1 + h*w, dim)",
    method="bicubic antialias; the pooled token's row kept",
    sizes="at least 31; pixels past the last multiple of 32 are dropped, with a warning",
    guarded=True,
    size=image_size,
)
def plan_modified_resnet(model: ModifiedResNet, ctx: Context) -> Changes:
    """Resample the positions of the attention pool, for which open_clip itself has no rule.

    Forward adds them to as many cells as there are, so the pool checks its map.
    """
    new = last_map(ctx.new_size)
    if min(new) < 1:
        ctx.invalid("leaves no map for the attention pool")
    ctx.warn_dropped(left_over(ctx.new_size, times(new, 32)), "stride 32")
    how = ctx.pos_embed(last_map(image_size(model)), new, prefix=1, dim=0)
    yield from ctx.parameter(model.attnpool, "positional_embedding", how)
    yield from ctx.guard(model.attnpool, lambda size: size, new)
    yield from record_size(model, ctx)
