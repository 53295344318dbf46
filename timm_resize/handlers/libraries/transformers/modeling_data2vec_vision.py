"""Data2Vec's vision model, which is BEiT under other names."""

from __future__ import annotations

from transformers.models.data2vec.modeling_data2vec_vision import (
    Data2VecVisionEmbeddings,
    Data2VecVisionPreTrainedModel,
    Data2VecVisionRelativePositionBias,
)

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.bias_tables import METHOD, SIZES, STATE, plan_bias, plan_positions
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model

register(Data2VecVisionPreTrainedModel, state=STATE, method=METHOD, sizes=SIZES, size=image_size)(plan_model)


@register(Data2VecVisionEmbeddings, state=STATE, method=METHOD)
def plan_data2vec_embeddings(embeddings: Data2VecVisionEmbeddings, ctx: Context) -> Changes:
    """Resample the position embeddings, where the model was built with them."""
    yield from plan_positions(embeddings, ctx)


@register(Data2VecVisionRelativePositionBias, state=STATE, method=METHOD)
def plan_data2vec_bias(bias: Data2VecVisionRelativePositionBias, ctx: Context) -> Changes:
    """Resample a block's table, or the one that all blocks share."""
    yield from plan_bias(bias, ctx)
