"""VOLO: a position embedding map after the outlookers; the class token, which joins last, has none."""

from __future__ import annotations

from timm.models.volo import VOLO, Downsample

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size, ceil_div, floor_div, text


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
    rest = (max(ctx.new_size[0] - grid[0] * cell[0], 0), max(ctx.new_size[1] - grid[1] * cell[1], 0))
    if any(rest):
        ctx.warn(
            f"img_size={ctx.new_size} leaves the last {rest[0]} rows and {rest[1]} columns of pixels out of "
            f"the transformer stages, whose cells take {text(cell)}."
        )
    if model.pos_embed is not None:
        old = (model.pos_embed.shape[1], model.pos_embed.shape[2])
        yield from ctx.parameter(model, "pos_embed", ctx.pos_embed_map(old, grid, dim=1))
        yield from ctx.guard(model.patch_embed, lambda size: _grid(model, size)[0])


def _grid(model: VOLO, size: Size) -> tuple[Size, Size]:
    """Return the grid of the position embedding for an image of `size`, and the pixels of one cell."""
    embed, cell = model.patch_embed, (1, 1)
    strides = [tuple(embed.proj.stride)]
    strides += [tuple(m.proj.stride) for m in model.network[:2] if isinstance(m, Downsample)]
    if embed.conv is not None:
        cell = tuple(embed.conv[0].stride)
        size = ceil_div(size, cell)
    for stride in strides:
        size, cell = floor_div(size, stride), (cell[0] * stride[0], cell[1] * stride[1])
    return size, cell
