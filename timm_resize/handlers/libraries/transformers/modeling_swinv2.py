"""Swin Transformer v2. A window is the configuration's, or the map where that is smaller; tables are coordinates."""

from __future__ import annotations

from transformers.models.swinv2.modeling_swinv2 import (
    Swinv2Embeddings,
    Swinv2Encoder,
    Swinv2ForMaskedImageModeling,
    Swinv2Layer,
    Swinv2PreTrainedModel,
    Swinv2SelfAttention,
)

from timm_resize.core.context import Changes, Context, Rebuild
from timm_resize.core.registry import register
from timm_resize.geometry import Size
from timm_resize.handlers.layers.relative_position import rebuild_index
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model, plan_square_model
from timm_resize.handlers.libraries.transformers.windows import SIZES, plan_stages, plan_window_embeddings, shifts
from timm_resize.handlers.swin_transformer_v2 import log_coordinates

STATE = "relative_coords_table, relative_position_index, shifts; position_embeddings, where it has them"

METHOD = "rebuilt for the windows that the library's constructor gives the map; positions bicubic, as its forward"

register(Swinv2PreTrainedModel, state=STATE, method=METHOD, sizes=SIZES, size=image_size)(plan_model)
register(Swinv2ForMaskedImageModeling, state=STATE, method=METHOD, sizes=f"square; {SIZES}", size=image_size)(
    plan_square_model
)


@register(Swinv2Embeddings, state=STATE, method=METHOD)
def plan_swinv2_embeddings(embeddings: Swinv2Embeddings, ctx: Context) -> Changes:
    """Set the grid, and resample the position embeddings, if there are any: one more than there are patches."""
    yield from plan_window_embeddings(embeddings, ctx, prefix=1)


@register(Swinv2Encoder, state=STATE, method=METHOD)
def plan_swinv2_encoder(encoder: Swinv2Encoder, ctx: Context) -> Changes:
    """Give each block the window and shift of a new model, which takes both from the height of its map."""
    stages = yield from plan_stages(encoder, ctx)
    for (height, width), _, blocks in stages:
        if min(height, width) < 1:
            ctx.invalid(f"gives a {height}x{width} map in a stage")
        window = min(height, encoder.config.window_size)
        for block, shift in shifts(encoder.config.window_size, blocks):
            yield from ctx.attribute(block, window_size=window, shift_size=shift if height > window else 0)
            if isinstance(block, Swinv2Layer):
                yield from _plan_coordinates(block.attention.self, ctx, (window, window))


def _plan_coordinates(attention: Swinv2SelfAttention, ctx: Context, window: Size) -> Changes:
    """Rebuild the coordinates and the index of a window, as `create_coords_table_and_index` makes them."""
    if tuple(attention.window_size) == window:
        return
    shape = (1, 2 * window[0] - 1, 2 * window[1] - 1, 2)
    rule = Rebuild(log_coordinates, (window, tuple(attention.pretrained_window_size)))
    yield from ctx.buffer(attention, "relative_coords_table", shape, rule)
    yield from rebuild_index(attention, ctx, window)
    yield from ctx.attribute(attention, window_size=window)
