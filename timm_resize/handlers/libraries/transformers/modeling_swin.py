"""Swin Transformer (v1). Windows do not depend on the image size here: a configuration gives one for all stages."""

from __future__ import annotations

from transformers.models.swin.modeling_swin import (
    SwinBackbone,
    SwinEmbeddings,
    SwinEncoder,
    SwinForMaskedImageModeling,
    SwinPreTrainedModel,
)

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import text
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model, plan_square_model
from timm_resize.handlers.libraries.transformers.windows import SIZES, plan_stages, plan_window_embeddings, shifts

STATE = "shifts; position_embeddings, where it has them; config.image_size"

METHOD = "bias tables and windows are kept, as by the constructor; positions bicubic, as forward does it"

LIMITS = f"{SIZES}; every stage's map at least one window"

register(SwinPreTrainedModel, state=STATE, method=METHOD, sizes=LIMITS, size=image_size)(plan_model)
register(SwinForMaskedImageModeling, state=STATE, method=METHOD, sizes=f"square; {LIMITS}", size=image_size)(
    plan_square_model
)


@register(SwinEmbeddings, state=STATE, method=METHOD)
def plan_swin_embeddings(embeddings: SwinEmbeddings, ctx: Context) -> Changes:
    """Set the grid, and resample the position embeddings, if there are any."""
    yield from plan_window_embeddings(embeddings, ctx, prefix=0)


@register(SwinEncoder, state=STATE, method=METHOD)
def plan_swin_encoder(encoder: SwinEncoder, ctx: Context) -> Changes:
    """Give each block its map, and the window and shift of a new model.

    A forward writes to both where a map is no larger than a window. For a smaller one it would need a smaller table;
    a backbone pads instead.
    """
    window = int(encoder.config.window_size)
    pads = any(isinstance(m, SwinBackbone) and encoder in m.modules() for m in ctx.root.modules())
    stages = yield from plan_stages(encoder, ctx)
    for number, (_, feat, blocks) in enumerate(stages):
        if min(feat) < window and not pads:
            ctx.invalid(f"gives a {text(feat)} map in stage {number}, smaller than window_size={window}")
        for block, shift in shifts(window, blocks):
            yield from ctx.attribute(block, window_size=window, shift_size=shift)
