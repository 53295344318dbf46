"""EfficientFormer v2: attention on strided maps in stage 3, on whole maps in stage 4."""

from __future__ import annotations

from timm.models.efficientformer_v2 import Attention2d, Attention2dDownsample, EfficientFormerV2
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size, divisible, text
from timm_resize.handlers.layers.conv_size import map_size, parts
from timm_resize.handlers.layers.offset_bias import resize_offset_bias


@register(
    EfficientFormerV2,
    state="attention_biases (heads, h*w) of stages 3 and 4",
    method="offsets mirrored, bicubic antialias, offset 0 kept",
    sizes="a 16th of each side, rounded up, must be even",
    guarded=True,
    examples={"efficientformerv2_s0": {"depths": (1, 1, 2, 2), "num_vit": 1, "mlp_ratios": (1, 1, 1, 1)}},
)
def plan_efficientformer_v2(model: EfficientFormerV2, ctx: Context) -> Changes:
    """Follow the map through stem and stages, whose convolutions all round up."""
    size = ctx.new_size
    for name, part in parts(model):
        if name == "stem" or name.startswith("stem_"):  # a feature wrapper flattens the stem
            size = map_size(part, size)
    for stage in ctx.sequence(model, "stages"):
        downsample = stage.downsample
        if not isinstance(downsample, nn.Identity):
            if downsample.attn is not None:
                yield from ctx.visit(downsample.attn, resolution=size)
            size = map_size(downsample.conv.conv, size)
        for block in stage.blocks:
            if block.token_mixer is not None:
                yield from ctx.visit(block.token_mixer, resolution=size)


@register(Attention2d, state="attention_biases (heads, h*w)", method="as EfficientFormerV2")
def plan_attention_2d(attention: Attention2d, ctx: Context, *, resolution: Size) -> Changes:
    """Resample the table for an input map of `resolution`; with a stride the attention is on the strided map.

    The strided map is enlarged by that factor and added to the input, so the input must be a multiple of it.
    """
    inner = resolution
    if attention.stride_conv is not None:
        stride = int(attention.upsample.scale_factor)
        if not divisible(resolution, stride):
            where = f"a {text(resolution)} map to {ctx.path(attention)}"
            ctx.invalid(f"gives {where}, not divisible by its stride={stride}")
        inner = map_size(attention.stride_conv.conv, resolution)
    yield from resize_offset_bias(attention, ctx, tuple(attention.resolution), inner)


@register(Attention2dDownsample, state="attention_biases (heads, h*w)", method="as EfficientFormerV2")
def plan_attention_2d_downsample(attention: Attention2dDownsample, ctx: Context, *, resolution: Size) -> Changes:
    """Resample the table for an input map of `resolution`; the queries are every second cell."""
    yield from resize_offset_bias(attention, ctx, tuple(attention.resolution), resolution, step=2)
