"""Eva and what is built from it: EVA, EVA-02, RoPE-ViT, Perception Encoder, DINOv3, LingBot-Vision, Sapiens2."""

from __future__ import annotations

from timm.models.eva import Eva

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.layers.patch_embed import plan_grids

_NARROW = {"depth": 1, "embed_dim": 48, "num_heads": 3}


@register(
    Eva,
    state="pos_embed (1, prefix + h*w, dim), where it has one; RoPE caches",
    method="bicubic antialias, prefix tokens kept; RoPE rebuilt, its pretraining grid kept",
    sizes="at least one patch; pixels past the last patch are dropped, with a warning (refused with dynamic_img_size)",
    options=("patch_size",),
    examples={
        "eva_giant_patch14_224": {**_NARROW, "class_token": False},
        "eva02_tiny_patch14_224": _NARROW,
        "vit_pe_core_base_patch16_224": _NARROW,
        "vit_medium_patch16_rope_reg1_gap_256": _NARROW,
        "vit_small_patch16_rope_224": _NARROW,
        "vit_small_patch16_rope_ape_224": {**_NARROW, "dynamic_img_size": True},
        "vit_small_patch16_rope_mixed_ape_224": _NARROW,
        "vit_tiny_patch16_dinov3_qkvb": {**_NARROW, "dynamic_img_size": False},
        "vit_small_patch16_dinov3": _NARROW,
    },
)
def plan_eva(model: Eva, ctx: Context) -> Changes:
    """Resample the position embedding and rebuild the rotary one for the new patch grid.

    With `dynamic_img_size` the forward resamples from `patch_embed.grid_size`, so both are set together, and the
    rotary embedding has no cache.
    """
    grids = yield from plan_grids(model, model.patch_embed, ctx)
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    yield from ctx.parameter(model, "pos_embed", ctx.pos_embed(grids.old, grids.new, prefix), optional=True)
    if model.rope is not None:
        yield from ctx.visit(model.rope, feat_shape=grids.new)
