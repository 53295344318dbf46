"""BEiT."""

from __future__ import annotations

from transformers.models.beit.modeling_beit import BeitEmbeddings, BeitPreTrainedModel, BeitRelativePositionBias

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.bias_tables import METHOD, SIZES, STATE, plan_bias, plan_positions
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model

register(BeitPreTrainedModel, state=STATE, method=METHOD, sizes=SIZES, size=image_size)(plan_model)


@register(BeitEmbeddings, state=STATE, method=METHOD)
def plan_beit_embeddings(embeddings: BeitEmbeddings, ctx: Context) -> Changes:
    """Resample the position embeddings, where the model was built with them."""
    yield from plan_positions(embeddings, ctx)


@register(BeitRelativePositionBias, state=STATE, method=METHOD)
def plan_beit_bias(bias: BeitRelativePositionBias, ctx: Context) -> Changes:
    """Resample a block's table, or the one that all blocks share."""
    yield from plan_bias(bias, ctx)
