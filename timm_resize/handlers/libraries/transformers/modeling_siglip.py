"""SigLIP's vision tower, alone and beside its text tower; SigLIP 2 of a fixed size is this class, too."""

from __future__ import annotations

from transformers.models.siglip.modeling_siglip import SiglipPreTrainedModel, SiglipVisionEmbeddings

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model
from timm_resize.handlers.libraries.transformers.positions import METHOD, SQUARE, plan_tower

STATE = "vision: position_embedding (h*w, dim), position_ids; config.image_size"

register(SiglipPreTrainedModel, state=STATE, method=METHOD, sizes=SQUARE, size=image_size)(plan_model)


@register(SiglipVisionEmbeddings, state=STATE, method=METHOD)
def plan_siglip_embeddings(embeddings: SiglipVisionEmbeddings, ctx: Context) -> Changes:
    """Resample the positions."""
    yield from plan_tower(embeddings, ctx, prefix=0)
