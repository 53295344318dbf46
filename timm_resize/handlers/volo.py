"""VOLO: a position embedding map after the outlookers; the class token, which joins last, has none."""

from __future__ import annotations

from timm.models.volo import VOLO, Downsample

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size, floor_div, left_over, text, times
from timm_resize.handlers.layers.conv_size import map_size


@register(
    VOLO,
    state="pos_embed (1, h, w, dim)",
    method="bicubic antialias",
    sizes="at least 16; dropped pixels warned of",
    guarded=True,
    examples={"volo_d1_224": {"mlp_ratio": 0.25, "stem_hidden_dim": 8}},
)
def plan_volo(model: VOLO, ctx: Context) -> Changes:
    """Resample the map to the grid that forward makes: the stem rounds up, the strides after it down.

    Stock's constructor rounds down throughout, which makes the map one cell short just below a multiple of 16.
    """
    grid, cell = _grid(model, ctx.new_size)
    floored = floor_div(ctx.new_size, cell)
    if min(floored) < 1:
        ctx.invalid(f"is smaller than one cell of the position embedding, which takes {text(cell)} pixels")
    if grid != floored:
        ctx.warn(
            f"img_size={ctx.new_size} gives a {text(grid)} map, where stock timm's constructor rounds down to "
            f"{text(floored)}: a checkpoint saved at this size needs timm_resize."
        )
    rest = left_over(ctx.new_size, times(grid, cell))
    ctx.warn_dropped(rest, f"the cells of the transformer stages take {text(cell)}")
    if model.pos_embed is not None:
        old = (model.pos_embed.shape[1], model.pos_embed.shape[2])
        yield from ctx.parameter(model, "pos_embed", ctx.pos_embed_map(old, grid, dim=1))
        yield from ctx.guard(model.patch_embed, lambda size: _grid(model, size)[0])


def _grid(model: VOLO, size: Size) -> tuple[Size, Size]:
    """Return the grid of the position embedding for an image of `size`, and the pixels of one cell."""
    embed = model.patch_embed
    first = (layer for part in model.network[:2] for layer in part.modules())
    layers = [embed.conv, embed.proj, *(layer.proj for layer in first if isinstance(layer, Downsample))]
    cell = (1, 1) if embed.conv is None else tuple(embed.conv[0].stride)
    for layer in layers:
        size = map_size(layer, size)
    for layer in layers[1:]:
        cell = times(cell, tuple(layer.stride))
    return size, cell
