"""Swin Transformer (v1) and S3: bias tables over windows, masks of shifted windows."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention

from timm_resize.core.context import Changes, Context
from timm_resize.core.plan import Rebuild
from timm_resize.core.registry import register
from timm_resize.geometry import Size
from timm_resize.handlers.layers.relative_position import relative_position_index
from timm_resize.handlers.layers.windows import OPTIONS, plan_block, plan_reductions, plan_stages

SMALL = {"embed_dim": 16, "num_heads": (1, 2, 2, 2)}


@register(
    WindowAttention,
    state="relative_position_bias_table ((2h-1)*(2w-1), heads), relative_position_index",
    method="geometric linear",
    sizes="any window",
)
def plan_window_attention(attn: WindowAttention, ctx: Context, *, window_size: Size) -> Changes:
    """Resample the bias table from the old window to the new, and rebuild the index into it."""
    old = tuple(attn.window_size)
    if old != window_size:
        area = window_size[0] * window_size[1]
        yield from ctx.parameter(attn, "relative_position_bias_table", ctx.rel_pos_table(old, window_size))
        yield from ctx.buffer(
            attn, "relative_position_index", (area, area), Rebuild(relative_position_index, (window_size,))
        )
        yield from ctx.attribute(attn, window_size=window_size, window_area=area)


@register(SwinTransformerBlock, state="attn_mask (windows, area, area)", method="rebuilt", sizes="any map")
def plan_swin_block(
    block: SwinTransformerBlock, ctx: Context, *, feat_size: Size, window_size: Size, shift_size: Size
) -> Changes:
    """Set the block's map, window, shift and mask; returns the window and shift it uses."""
    return (yield from plan_block(block, ctx, feat_size, window_size, shift_size, "input_resolution"))


@register(
    SwinTransformer,
    state="bias tables, indices and masks per window",
    method="tables: geometric linear; window_policy timm: windows scale with the grid, a new model keeps them",
    sizes="at least one patch; windows that do not divide a map let shifted ones attend across the edge, with a note",
    options=("patch_size", *OPTIONS),
    examples={
        "swin_tiny_patch4_window7_224": {**SMALL, "depths": (2, 2, 2, 2)},
        "swin_s3_small_224": {**SMALL, "depths": (2, 1, 2, 2)},
    },
)
def plan_swin_transformer(model: Any, ctx: Context) -> Changes:
    """Choose each stage's window on the new grid and resample its tables.

    The windows that later resizes scale from are the constructor's, or those given last.
    """
    old, grid, patch = yield from ctx.visit(model.patch_embed)
    yield from plan_reductions(model, ctx, patch)
    yield from plan_stages(model, ctx, ctx.sequence(model, "layers"), old, grid)
