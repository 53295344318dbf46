"""ViTMAE: fixed sine and cosine positions, of the encoder and of the decoder."""

from __future__ import annotations

from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder, ViTMAEEmbeddings, ViTMAEPreTrainedModel

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import divisible, floor_div, short
from timm_resize.handlers.libraries.transformers.configs import as_pair, image_size, plan_model, refuse_oblong
from timm_resize.handlers.libraries.transformers.positions import METHOD, SQUARE, plan_embeddings

STATE = "position_embeddings (1, 1 + h*w, dim); decoder_pos_embed, likewise; config.image_size"

WHY = "the constructor makes positions for a square grid alone"

register(ViTMAEPreTrainedModel, state=STATE, method=METHOD, sizes=SQUARE, size=image_size)(plan_model)


@register(ViTMAEEmbeddings, state=STATE, method=METHOD)
def plan_mae_embeddings(embeddings: ViTMAEEmbeddings, ctx: Context) -> Changes:
    """Resample the encoder's positions, so that they reach as far as those that it was trained with."""
    refuse_oblong(ctx, WHY)
    yield from plan_embeddings(embeddings, ctx, prefix=1)


@register(ViTMAEDecoder, state=STATE, method=METHOD)
def plan_mae_decoder(decoder: ViTMAEDecoder, ctx: Context) -> Changes:
    """Resample the decoder's positions as the encoder's.

    The library has no rule for them that could be followed: its interpolation takes the flattened grid for one long
    row, and a new model of it has zeros there, until a checkpoint brings sines and cosines.
    """
    refuse_oblong(ctx, WHY)
    side = round((decoder.decoder_pos_embed.shape[1] - 1) ** 0.5)
    patch = as_pair(decoder.config.patch_size)
    if not divisible(ctx.new_size, patch):
        ctx.invalid(f"is not divisible by patch_size={short(patch)}, by which the loss cuts the image")
    new = floor_div(ctx.new_size, patch)
    how = ctx.pos_embed((side, side), new, 1, antialias=False)
    yield from ctx.parameter(decoder, "decoder_pos_embed", how)
