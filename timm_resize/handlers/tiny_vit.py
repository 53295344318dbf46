"""TinyViT: square windows of a fixed size, padded to; only a change of window touches the weights."""

from __future__ import annotations

from timm.models.tiny_vit import Attention, ConvLayer, TinyVit, TinyVitBlock, TinyVitStage

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size
from timm_resize.handlers.layers.offset_bias import resize_offset_bias
from timm_resize.handlers.layers.square_windows import scaled_side, square_side

_NARROW = {"embed_dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2)}


@register(
    TinyVit,
    state="attention_biases (heads, window*window)",
    method="windows kept, or with window_size= and window_policy='scale' offsets mirrored, bicubic, offset 0 kept",
    sizes="any: maps are padded to whole windows",
    options=("window_size",),
    guarded=True,
    examples={
        "tiny_vit_5m_224": {"depths": (1, 1, 2, 1), **_NARROW},
        "tiny_vit_21m_384": {"depths": (1, 1, 1, 1), **_NARROW},
    },
)
def plan_tiny_vit(model: TinyVit, ctx: Context) -> Changes:
    """Keep every window unless asked: any map runs, padded to whole windows, and weights carry over as they are.

    The published models for 384 and 512 pixels scale the windows like the image: `window_size=(12, 12, 24, 12)`,
    one per stage with the first, which has no attention, unused; or `window_policy="scale"`.
    """
    stages = ctx.sequence(model, "stages")
    given = ctx.window_sizes(len(stages))
    windows = [_window(stage, ctx) if given is None else square_side(given[i], ctx) for i, stage in enumerate(stages)]
    for stage, window in zip(stages, windows, strict=True):
        for block in stage.blocks if isinstance(stage, TinyVitStage) else ():
            yield from ctx.visit(block, window_size=window)
    if given is not None or ctx.request.window_policy == "scale":
        ctx.record(built=True, window_sizes=windows)


def _window(stage: TinyVitStage | ConvLayer, ctx: Context) -> int:
    """Return the window that the policy gives a stage; 7 for a stage without attention, as the constructor."""
    if not isinstance(stage, TinyVitStage):
        return 7
    window = int(stage.blocks[0].window_size)
    if ctx.request.window_policy != "scale" or ctx.old_size is None:
        return window
    return scaled_side(window, ctx.old_size, ctx.new_size)


@register(TinyVitBlock, state="window_size")
def plan_tiny_vit_block(block: TinyVitBlock, ctx: Context, *, window_size: int | None = None) -> Changes:
    """Set the side of the square window; None keeps it."""
    side = int(block.window_size) if window_size is None else window_size
    yield from ctx.attribute(block, window_size=side)
    yield from ctx.visit(block.attn, resolution=(side, side))


@register(Attention, state="attention_biases (heads, h*w)", method="offsets mirrored, offset 0 kept")
def plan_attention(attention: Attention, ctx: Context, *, resolution: Size) -> Changes:
    """Resample the table for a window of `resolution`."""
    yield from resize_offset_bias(attention, ctx, attention.resolution, resolution)
