"""DINOv2 with registers."""

from __future__ import annotations

from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEmbeddings,
    Dinov2WithRegistersPreTrainedModel,
)

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model, refuse_oblong
from timm_resize.handlers.libraries.transformers.modeling_dinov2 import WHY
from timm_resize.handlers.libraries.transformers.positions import SQUARE, STATE, plan_embeddings

METHOD = "bicubic antialias, as interpolate_pos_encoding does it; the class token's kept"

register(Dinov2WithRegistersPreTrainedModel, state=STATE, method=METHOD, sizes=SQUARE, size=image_size)(plan_model)


@register(Dinov2WithRegistersEmbeddings, state=STATE, method=METHOD)
def plan_register_embeddings(embeddings: Dinov2WithRegistersEmbeddings, ctx: Context) -> Changes:
    """Resample the position embeddings as forward does it, which antialiases here; registers have no positions."""
    refuse_oblong(ctx, WHY)
    yield from plan_embeddings(embeddings, ctx, prefix=1, antialias=True)
