"""VisionTransformer and what is built from it: DeiT, hybrids, ViTamin, FlexiViT, DINOv2, SigLIP, CLIP …."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from timm_resize.context import Changes, Context
from timm_resize.registry import register


@register(
    VisionTransformer,
    state="pos_embed (1, prefix + h*w, dim)",
    method="bicubic antialias; prefix tokens kept",
    sizes="at least one patch; pixels past the last patch are dropped, with a warning",
    options=("patch_size",),
    examples=(
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "flexivit_small",
        "vit_tiny_r_s16_p8_224",
        "vitamin_small_224",
        "vit_base_patch16_gap_224",
    ),
)
def plan_vision_transformer(model: VisionTransformer, ctx: Context) -> Changes:
    """Resample the position embedding from the old patch grid to the new.

    With `dynamic_img_size` the forward resamples from `patch_embed.grid_size`, so both are set together.
    """
    old, new = yield from ctx.visit(model.patch_embed)
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    yield from ctx.parameter(model, "pos_embed", ctx.pos_embed(old, new, prefix))
    if ctx.request.patch_size is not None:
        reduction = max(ctx.request.patch_size)
        yield from ctx.attribute(model, feature_info=[dict(i, reduction=reduction) for i in model.feature_info])
