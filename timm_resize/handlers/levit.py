"""LeViT, with linear layers or convolutions: attention biases over absolute offsets, per stage."""

from __future__ import annotations

from collections.abc import Callable

from timm.models.levit import Attention, AttentionDownsample, ConvNorm, Levit, Stem8, Stem16
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size, ceil_div
from timm_resize.handlers.layers.conv_size import map_size, parts
from timm_resize.handlers.layers.offset_bias import resize_offset_bias

_SMALL = dict(embed_dim=(32, 48, 64), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1))


@register(
    Levit,
    state="attention_biases (heads, h*w) over |offset|, attention_bias_idxs",
    method="bicubic over mirrored offsets, first and last pinned",
    sizes="any, from 1 pixel: stem and stages round up",
    guarded=True,
    examples={
        "levit_128s": {"depth": (1, 1, 1)},
        "levit_512": _SMALL,
        "levit_384_s8": _SMALL,
        "levit_conv_128s": _SMALL,
        "levit_conv_512_s8": _SMALL,
    },
)
def plan_levit(model: Levit, ctx: Context) -> Changes:
    """Walk the stages on the grids that forward makes, each rounded up, where stock's constructor rounds down."""
    stem, stem_grid = _stem(model, ctx)
    grid = stem_grid(ctx.new_size)
    yield from ctx.guard(stem, stem_grid)  # tokens are counted only, so another shape of as many would run
    for stage in ctx.sequence(model, "stages"):
        downsample = getattr(stage.downsample, "attn_downsample", None)
        if downsample is not None:
            grid = yield from ctx.visit(downsample, resolution=grid)
        for block in stage.blocks:
            yield from ctx.visit(block.attn, resolution=grid)


@register(Attention, AttentionDownsample, state="attention_biases (heads, h*w)", method="bicubic over mirrored offsets")
def plan_attention(attn: Attention | AttentionDownsample, ctx: Context, *, resolution: Size) -> Changes:
    """Resample the bias table over the offsets in the keys' grid (h, w), the input; returns the queries' grid.

    The queries of a downsampling attention are every `stride`-th cell.
    """
    stride = attn.stride if isinstance(attn, AttentionDownsample) else 1
    yield from resize_offset_bias(attn, ctx, tuple(attn.resolution), resolution, step=stride)
    if isinstance(attn, AttentionDownsample) and hasattr(attn.q.down, "resolution"):
        yield from ctx.attribute(attn.q.down, resolution=resolution)  # of a linear one; a convolution needs none
    return ceil_div(resolution, stride)


def _stem(model: nn.Module, ctx: Context) -> tuple[nn.Module, Callable[[Size], Size]]:
    """Return the module that is given the image, and the grid after the stem for an image.

    A feature wrapper may have flattened the stem to `stem_*`.
    """
    stem = [m for name, m in parts(model) if name == "stem" or name.startswith("stem_")]
    if any(list(p.parameters()) and not isinstance(p, (Stem8, Stem16, ConvNorm)) for p in stem):
        first = next(m for part in stem for m in part.modules() if isinstance(m, nn.Conv2d))
        grid = ctx.output_size(*stem, channels=first.in_channels)  # a stem_backbone of the user's
        return stem[0], lambda size: grid if size == ctx.new_size else (0, 0)

    def after(size: Size) -> Size:
        for part in stem:
            size = map_size(part, size)
        return size

    return stem[0], after
