"""ViT."""

from __future__ import annotations

from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTForMaskedImageModeling, ViTPreTrainedModel

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model, plan_square_model
from timm_resize.handlers.libraries.transformers.positions import METHOD, SIZES, SQUARE, STATE, plan_embeddings

register(ViTPreTrainedModel, state=STATE, method=METHOD, sizes=SIZES, size=image_size)(plan_model)
register(ViTForMaskedImageModeling, state=STATE, method=METHOD, sizes=SQUARE, size=image_size)(plan_square_model)


@register(ViTEmbeddings, state=STATE, method=METHOD)
def plan_vit_embeddings(embeddings: ViTEmbeddings, ctx: Context) -> Changes:
    """Resample the position embeddings behind that of the class token."""
    yield from plan_embeddings(embeddings, ctx, prefix=1)
