"""DeiT."""

from __future__ import annotations

from transformers.models.deit.modeling_deit import DeiTEmbeddings, DeiTForMaskedImageModeling, DeiTPreTrainedModel

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model, plan_square_model
from timm_resize.handlers.libraries.transformers.positions import METHOD, SIZES, SQUARE, STATE, plan_embeddings

register(DeiTPreTrainedModel, state=STATE, method=METHOD, sizes=SIZES, size=image_size)(plan_model)
register(DeiTForMaskedImageModeling, state=STATE, method=METHOD, sizes=SQUARE, size=image_size)(plan_square_model)


@register(DeiTEmbeddings, state=STATE, method=METHOD)
def plan_deit_embeddings(embeddings: DeiTEmbeddings, ctx: Context) -> Changes:
    """Resample the position embeddings behind those of the class and distillation tokens."""
    yield from plan_embeddings(embeddings, ctx, prefix=2)
