"""DINOv2."""

from __future__ import annotations

from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings, Dinov2PreTrainedModel

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model, refuse_oblong
from timm_resize.handlers.libraries.transformers.positions import METHOD, SQUARE, STATE, plan_embeddings

WHY = (
    "each forward takes the positions for those of a square grid and interpolates them to the image: leave the model "
    "at a square size, and give it the images as they are"
)

register(Dinov2PreTrainedModel, state=STATE, method=METHOD, sizes=SQUARE, size=image_size)(plan_model)


@register(Dinov2Embeddings, state=STATE, method=METHOD)
def plan_dinov2_embeddings(embeddings: Dinov2Embeddings, ctx: Context) -> Changes:
    """Resample the position embeddings to what forward makes of them for an image of the new size.

    This library gives `interpolate` the size wanted, so DINOv2's offset of 0.1 to the scale has no place in it.
    """
    refuse_oblong(ctx, WHY)
    yield from plan_embeddings(embeddings, ctx, prefix=1)
