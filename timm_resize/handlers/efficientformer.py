"""EfficientFormer: attention on the last map, whose grid stock fixes at 7x7."""

from __future__ import annotations

import torch
from timm.models.efficientformer import Attention, EfficientFormer
from torch import Tensor, nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.errors import UnsupportedModelError
from timm_resize.geometry import Size, ceil_div, divisible, text
from timm_resize.handlers.layers.conv_size import map_size
from timm_resize.handlers.layers.offset_bias import offset_index, resize_offset_bias

_STOCK_GRID = (7, 7)
"""What the constructor makes at every `img_size`."""

_NARROW = {"num_vit": 2, "mlp_ratios": 1, "embed_dims": (16, 32, 48, 64)}


@register(
    EfficientFormer,
    state="attention_biases (heads, h*w) of the last blocks; attention_bias_idxs, in the checkpoint",
    method="offsets mirrored, bicubic antialias, offset 0 kept; index rebuilt",
    sizes="any; intermediate features of the last stage need an even map at a 16th",
    guarded=True,
    examples={
        "efficientformer_l1": {"depths": (1, 1, 1, 3), **_NARROW},
        "efficientformer_l7": {"depths": (1, 1, 1, 2), **_NARROW},
    },
)
def plan_efficientformer(model: EfficientFormer, ctx: Context) -> Changes:
    """Follow the map through stem and stages, whose convolutions all round up."""
    size = map_size(model.stem, ctx.new_size)
    stages = ctx.sequence(model, "stages")
    for i, stage in enumerate(stages):
        before, size = size, map_size(stage.downsample, size)
        mixers = [getattr(block, "token_mixer", None) for block in stage.blocks]
        attentions = [mixer for mixer in mixers if isinstance(mixer, Attention)]
        for attention in attentions:
            yield from ctx.visit(attention, resolution=size)
        if attentions and i == model.num_stages - 1 and not divisible(before, 2):
            if isinstance(model.norm, nn.Identity):  # pruned to a feature extractor, which has no other forward
                ctx.invalid(f"gives a {text(before)} map before the last stage, whose features need an even one")
            ctx.note(f"forward_intermediates cannot reshape the last stage's output after an odd map ({text(before)})")


@register(Attention, state="attention_biases (heads, h*w), attention_bias_idxs", method="as EfficientFormer")
def plan_attention(attention: Attention, ctx: Context, *, resolution: Size) -> Changes:
    """Resample the table for a map of `resolution`."""
    yield from resize_offset_bias(attention, ctx, _old_grid(attention, ctx), resolution)


def _old_grid(attention: Attention, ctx: Context) -> Size:
    """Return the grid of the present table, which no attribute records: the one whose index the module holds.

    That is the grid of the model's size, or, where stock's constructor ignored that size, the one it always makes.
    On the meta device an index has no values and the number of cells decides.
    """
    index: Tensor = attention.attention_bias_idxs
    known = [] if ctx.old_size is None else [ceil_div(ctx.old_size, 32)]
    for grid in (*known, _STOCK_GRID):
        if grid[0] * grid[1] != index.shape[0]:
            continue
        if index.is_meta or torch.equal(offset_index(grid, 1, device=index.device, dtype=index.dtype), index):
            return grid
    raise UnsupportedModelError(
        f"{type(ctx.root).__name__}: {ctx.path(attention)} has {index.shape[0]} offsets, not of the grid that "
        f"img_size={ctx.old_size} gives. Build the model anew and resize that."
    )
