"""DINOv3 ViT: rotary positions, computed in each forward from the image."""

from __future__ import annotations

from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTPreTrainedModel, DINOv3ViTRopePositionEmbedding

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.configs import as_pair, image_size, plan_model
from timm_resize.handlers.libraries.transformers.positions import SIZES, patch_grid

STATE, METHOD = "config.image_size", "no tensor has a size"

register(DINOv3ViTPreTrainedModel, state=STATE, method=METHOD, sizes=SIZES, size=image_size)(plan_model)


@register(DINOv3ViTRopePositionEmbedding, state="num_patches_h, num_patches_w", method=METHOD)
def plan_rope(rope: DINOv3ViTRopePositionEmbedding, ctx: Context) -> Changes:
    """Set the grid that the module keeps; its forward computes the image's own."""
    rows, columns = patch_grid(ctx, as_pair(rope.config.patch_size))
    yield from ctx.attribute(rope, num_patches_h=rows, num_patches_w=columns)
