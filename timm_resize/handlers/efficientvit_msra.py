"""EfficientViT (MSRA): cascaded group attention in square windows, with a table over absolute offsets."""

from __future__ import annotations

from timm.models.efficientvit_msra import (
    CascadedGroupAttention,
    EfficientVitMsra,
    EfficientVitStage,
    LocalWindowAttention,
)

from timm_resize.core.context import Changes, Context, Rebuild
from timm_resize.core.registry import register
from timm_resize.handlers.layers.offset_bias import offset_index
from timm_resize.handlers.layers.square_windows import scaled_side, square_side

CELL = 16
"""Pixels per cell of the first stage: four convolutions of stride 2."""


@register(
    EfficientVitMsra,
    state="attention_biases (heads, window²) where the window spans the map",
    method="bicubic antialias",
    sizes="both sides at least 16; maps are padded to whole windows",
    options=("window_size",),
    guarded=True,
    examples={
        "efficientvit_m0": {"embed_dim": (16, 32, 48), "depth": (1, 1, 2), "num_heads": (2, 2, 3), "key_dim": (8, 8, 8)}
    },
)
def plan_efficientvit_msra(model: EfficientVitMsra, ctx: Context) -> Changes:
    """Give each stage windows of at most its map's shorter side, as stock counts it.

    Stock floors the shorter side to 16-pixel cells while the convolutions round up. A map larger than the count is
    padded to whole windows in forward, so only a count of zero, which leaves windows of no cell, is invalid.
    """
    count = min(ctx.new_size) // CELL
    if count < 1:
        ctx.invalid(f"has a side below {CELL} pixels, which leaves windows of 0x0")
    if "img_size" in model.__dict__:
        yield from ctx.attribute(model, img_size=min(ctx.new_size))
    stages = ctx.sequence(model, "stages")
    resolutions = []
    for stage in stages:
        count = -(-count // stage.stride)  # 3x3 convolution, padding 1
        resolutions.append(count)
    windows = _windows(stages, ctx, resolutions)
    for stage, resolution, window in zip(stages, resolutions, windows, strict=True):
        yield from ctx.attribute(stage, resolution=resolution)
        for block in stage.blocks:
            yield from ctx.visit(block.mixer.m, resolution=resolution, window=window)


def _windows(stages: list[EfficientVitStage], ctx: Context, resolutions: list[int]) -> list[int]:
    """Return the largest window of each stage: given, kept, grown with the map, or the constructor's."""
    given, mixers = ctx.window_sizes(len(stages)), [stage.blocks[0].mixer.m for stage in stages]
    if given:
        windows = [square_side(window, ctx) for window in given]
    elif ctx.request.window_policy == "keep":
        windows = [mixer.attn.resolution for mixer in mixers]
    elif ctx.request.window_policy == "scale":
        old, new = stages[0].resolution, resolutions[0]
        windows = [scaled_side(mixer.window_resolution, (old, old), (new, new)) for mixer in mixers]
    else:
        return [mixer.window_resolution for mixer in mixers]
    ctx.record(window_size=windows)
    return windows


@register(LocalWindowAttention, state="resolution, window_resolution")
def plan_local_window_attention(mixer: LocalWindowAttention, ctx: Context, *, resolution: int, window: int) -> Changes:
    """Set the stage's count and the largest window; windows never exceed the count."""
    yield from ctx.attribute(mixer, resolution=resolution, window_resolution=window)
    yield from ctx.visit(mixer.attn, resolution=min(window, resolution))


@register(CascadedGroupAttention, state="attention_biases (heads, window²)", method="bicubic antialias")
def plan_cascaded_group_attention(attention: CascadedGroupAttention, ctx: Context, *, resolution: int) -> Changes:
    """Resample the table over (|dy|, |dx|), row-major, as stock does: half-pixel, so offset 0 is not pinned."""
    old = attention.resolution
    how = ctx.pos_embed((old, old), (resolution, resolution), dim=1)
    yield from ctx.parameter(attention, "attention_biases", how)
    if resolution != old:
        rule = Rebuild(offset_index, ((resolution, resolution), 1))
        yield from ctx.attribute(attention, resolution=resolution)
        yield from ctx.buffer(attention, "attention_bias_idxs", (resolution**2, resolution**2), rule)
    yield from ctx.attribute(attention, attention_bias_cache={})
