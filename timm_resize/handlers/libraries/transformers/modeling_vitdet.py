"""ViTDet: windowed blocks of a fixed window, global blocks whose relative positions span the map."""

from __future__ import annotations

from transformers.models.vitdet.modeling_vitdet import VitDetEncoder, VitDetLayer, VitDetPreTrainedModel

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.configs import as_pair, image_size, plan_model
from timm_resize.handlers.libraries.transformers.positions import SIZES, patch_grid
from timm_resize.resample import Interpolate, Resample

STATE = "rel_pos_h, rel_pos_w (2*side - 1, dim) of the global blocks; config.image_size"

METHOD = "linear, half-pixel, as forward does it; positions stay at pretrain_image_size, and forward interpolates them"

register(VitDetPreTrainedModel, state=STATE, method=METHOD, sizes=SIZES, size=image_size)(plan_model)


@register(VitDetEncoder, state=STATE, method=METHOD)
def plan_vitdet_encoder(encoder: VitDetEncoder, ctx: Context) -> Changes:
    """Resample both tables of the blocks without windows, so that they are what forward makes of them at that map."""
    grid = patch_grid(ctx, as_pair(encoder.config.patch_size))
    blocks = [block for block in encoder.layer if isinstance(block, VitDetLayer) and block.window_size == 0]
    for attention in (block.attention for block in blocks if block.attention.use_relative_position_embeddings):
        for name, side in zip(("rel_pos_h", "rel_pos_w"), grid, strict=True):
            rows = int(getattr(attention, name).shape[0])
            how = Interpolate(rows, 2 * side - 1, **ctx.interpolation(mode="bilinear", antialias=False))
            yield from ctx.parameter(attention, name, Resample((how,)))
