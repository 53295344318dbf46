"""Swin Transformer (v1) and S3: bias tables over windows, masks of shifted windows."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size
from timm_resize.handlers.layers.patch_embed import plan_grids
from timm_resize.handlers.layers.relative_position import resize_bias_table
from timm_resize.handlers.layers.windows import OPTIONS, SIZES, SMALL, plan_stages


@register(
    WindowAttention,
    state="relative_position_bias_table ((2h-1)*(2w-1), heads), relative_position_index",
    method="geometric linear",
    sizes="any window",
)
def plan_window_attention(attn: WindowAttention, ctx: Context, *, window_size: Size) -> Changes:
    """Resample the bias table from the old window to the new, and rebuild the index into it."""
    yield from resize_bias_table(attn, ctx, window_size)


@register(
    SwinTransformer,
    state="bias tables, indices and masks per window",
    method="tables: geometric linear; window_policy timm: windows scale with the grid, a new model keeps them",
    sizes=SIZES,
    options=("patch_size", *OPTIONS),
    examples={
        "swin_tiny_patch4_window7_224": {**SMALL, "depths": (2, 2, 2, 2)},
        "swin_s3_small_224": {**SMALL, "depths": (2, 1, 2, 2)},
    },
)
def plan_swin_transformer(model: SwinTransformer | SwinTransformerV2, ctx: Context) -> Changes:
    """Choose each stage's window on the new grid, and resample or rebuild what depends on it; v2 has it, too.

    The windows that later resizes scale from are the constructor's, or those given last.
    """
    grids = yield from plan_grids(model, model.patch_embed, ctx, growth=2)
    yield from plan_stages(model, ctx, ctx.sequence(model, "layers"), grids)
