"""BEiT and BEiT v2: bias tables per block or shared, and in some checkpoints a position embedding."""

from __future__ import annotations

from timm.models.beit import Attention, Beit, RelativePositionBias

from timm_resize.core.context import Changes, Context
from timm_resize.core.plan import Rebuild
from timm_resize.core.registry import register
from timm_resize.geometry import Size
from timm_resize.handlers.layers.relative_position import relative_position_index

TOKEN_ROWS = 3
"""Last rows of a table: class token to patch, patch to class token, class token to itself."""


@register(
    Beit,
    state="relative_position_bias_table ((2h-1)*(2w-1) + 3, heads), shared or per block; pos_embed",
    method="geometric linear; pos_embed bicubic antialias; class token kept",
    sizes="at least one patch; pixels past the last patch are dropped, with a warning",
    options=("patch_size",),
    examples={
        "beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3},
        "beitv2_base_patch16_224": {
            "depth": 1,
            "embed_dim": 48,
            "num_heads": 3,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "use_abs_pos_emb": True,
        },
    },
)
def plan_beit(model: Beit, ctx: Context) -> Changes:
    """Take the whole patch grid as the window of every table."""
    old, new, reduction = yield from ctx.visit(model.patch_embed)
    yield from ctx.parameter(model, "pos_embed", ctx.pos_embed(old, new, prefix=model.num_prefix_tokens))
    if model.rel_pos_bias is not None:
        yield from ctx.visit(model.rel_pos_bias, window_size=new)
    for block in model.blocks:
        yield from ctx.visit(block.attn, window_size=new)
    yield from ctx.attribute(model, feature_info=[dict(i, reduction=reduction) for i in model.feature_info])


@register(Attention, state="relative_position_bias_table, where it has one", method="geometric linear")
def plan_beit_attention(attention: Attention, ctx: Context, *, window_size: Size) -> Changes:
    """Resample the block's own table; blocks that use the shared one have none."""
    if attention.relative_position_bias_table is not None:
        yield from _table(attention, ctx, window_size)
        yield from ctx.attribute(attention, num_relative_distance=_offsets(window_size) + TOKEN_ROWS)


@register(RelativePositionBias, state="relative_position_bias_table", method="geometric linear")
def plan_beit_relative_position_bias(bias: RelativePositionBias, ctx: Context, *, window_size: Size) -> Changes:
    """Resample the table that all blocks share."""
    yield from _table(bias, ctx, window_size)
    yield from ctx.attribute(bias, window_area=window_size[0] * window_size[1])


def _table(owner: Attention | RelativePositionBias, ctx: Context, window: Size) -> Changes:
    old = tuple(owner.window_size)
    how = ctx.rel_pos_table(old, window, suffix=TOKEN_ROWS)
    yield from ctx.parameter(owner, "relative_position_bias_table", how)
    if window != old:
        tokens = 1 + window[0] * window[1]
        yield from ctx.attribute(owner, window_size=window)
        yield from ctx.buffer(
            owner, "relative_position_index", (tokens, tokens), Rebuild(relative_position_index, (window, True))
        )


def _offsets(window: Size) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)
