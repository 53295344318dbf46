"""DPT: its own ViT, or a backbone of the library, which has its own handlers."""

from __future__ import annotations

from transformers.models.dpt.modeling_dpt import DPTPreTrainedModel, DPTViTEmbeddings, DPTViTHybridEmbeddings

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import floor_div
from timm_resize.handlers.libraries.transformers.configs import as_pair, image_size, plan_model, refuse_oblong
from timm_resize.handlers.libraries.transformers.positions import SQUARE, follow_size, patch_grid, plan_embeddings

STATE = "position_embeddings (1, 1 + h*w, dim) of its own ViT, or its backbone's state; config.image_size"

METHOD = "its own bilinear, as each forward does it; class token kept"

WHY = "each forward takes the positions for those of a square grid"

register(DPTPreTrainedModel, state=STATE, method=METHOD, sizes=SQUARE, size=image_size)(plan_model)


@register(DPTViTEmbeddings, state=STATE, method=METHOD)
def plan_dpt_embeddings(embeddings: DPTViTEmbeddings, ctx: Context) -> Changes:
    """Resample the positions to what forward makes of them for an image of the new size."""
    refuse_oblong(ctx, WHY)
    yield from plan_embeddings(embeddings, ctx, prefix=1, mode="bilinear")


@register(DPTViTHybridEmbeddings, state=STATE, method=METHOD)
def plan_hybrid_embeddings(embeddings: DPTViTHybridEmbeddings, ctx: Context) -> Changes:
    """Likewise for positions on the last map of a convolutional backbone, whose stride is the patch size."""
    refuse_oblong(ctx, WHY)
    patch, old_size = (as_pair(getattr(embeddings, name)) for name in ("patch_size", "image_size"))
    how = ctx.pos_embed(floor_div(old_size, patch), patch_grid(ctx, patch), 1, mode="bilinear", antialias=False)
    yield from ctx.parameter(embeddings, "position_embeddings", how)
    yield from follow_size(embeddings, ctx)
