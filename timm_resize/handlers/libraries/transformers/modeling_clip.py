"""CLIP's vision tower, alone and beside its text tower."""

from __future__ import annotations

from transformers.models.clip.modeling_clip import CLIPPreTrainedModel, CLIPVisionEmbeddings

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model
from timm_resize.handlers.libraries.transformers.positions import METHOD, SQUARE, plan_tower

STATE = "vision: position_embedding (1 + h*w, dim), position_ids; config.image_size"

register(CLIPPreTrainedModel, state=STATE, method=METHOD, sizes=SQUARE, size=image_size)(plan_model)


@register(CLIPVisionEmbeddings, state=STATE, method=METHOD)
def plan_clip_embeddings(embeddings: CLIPVisionEmbeddings, ctx: Context) -> Changes:
    """Resample the positions behind the class token's."""
    yield from plan_tower(embeddings, ctx, prefix=1)
