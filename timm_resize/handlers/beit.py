"""BEiT and BEiT v2: bias tables per block or shared, and in some checkpoints a position embedding."""

from __future__ import annotations

from timm.models.beit import Attention, Beit, RelativePositionBias

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size
from timm_resize.handlers.layers.patch_embed import SIZES, plan_grids
from timm_resize.handlers.layers.relative_position import resize_bias_table

_NARROW = {"depth": 1, "embed_dim": 48, "num_heads": 3}


@register(
    Beit,
    state="relative_position_bias_table ((2h-1)*(2w-1) + 3, heads), shared or per block; pos_embed",
    method="geometric linear; pos_embed bicubic antialias; class token kept",
    sizes=SIZES,
    options=("patch_size",),
    examples={
        "beit_base_patch16_224": {**_NARROW, "depth": 2},
        "beitv2_base_patch16_224": {
            **_NARROW,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "use_abs_pos_emb": True,
        },
    },
)
def plan_beit(model: Beit, ctx: Context) -> Changes:
    """Take the whole patch grid as the window of every table."""
    grids = yield from plan_grids(model, model.patch_embed, ctx)
    how = ctx.pos_embed(grids.old, grids.new, prefix=model.num_prefix_tokens)
    yield from ctx.parameter(model, "pos_embed", how, optional=True)
    if model.rel_pos_bias is not None:
        yield from ctx.visit(model.rel_pos_bias, window_size=grids.new)
    for block in model.blocks:
        yield from ctx.visit(block.attn, window_size=grids.new)


@register(
    Attention, RelativePositionBias, state="relative_position_bias_table, where it has one", method="geometric linear"
)
def plan_beit_bias(bias: Attention | RelativePositionBias, ctx: Context, *, window_size: Size) -> Changes:
    """Resample a table, a block's own or the one that all share; blocks that use the shared one have none."""
    if bias.relative_position_bias_table is not None:
        yield from resize_bias_table(bias, ctx, window_size, class_token=True)
