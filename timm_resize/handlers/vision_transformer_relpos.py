"""VisionTransformerRelPos: a ViT whose only position information is a relative bias over the whole patch grid."""

from __future__ import annotations

from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.layers.patch_embed import SIZES, plan_grids

_NARROW = {"depth": 1, "embed_dim": 96, "num_heads": 3}


@register(
    VisionTransformerRelPos,
    state="rel_pos per block, or one shared: RelPosMlp coordinates, or RelPosBias tables",
    method="coordinates rebuilt, tables resampled",
    sizes=SIZES,
    options=("patch_size",),
    examples={
        "vit_relpos_small_patch16_224": {**_NARROW, "depth": 2},
        "vit_srelpos_small_patch16_224": {**_NARROW, "depth": 2, "rel_pos_dim": 64},
        "vit_relpos_medium_patch16_cls_224": {**_NARROW, "rel_pos_type": "bias"},
        "vit_relpos_base_patch16_clsgap_224": _NARROW,
        "vit_relpos_base_patch32_plus_rpn_256": _NARROW,
        "vit_relpos_medium_patch16_rpn_224": {**_NARROW, "rel_pos_type": "bias", "shared_rel_pos": True},
        "test_vit_relpos": {"depth": 1, "rel_pos_type": "mlp_swin"},
    },
)
def plan_vision_transformer_relpos(model: VisionTransformerRelPos, ctx: Context) -> Changes:
    """Set the patch grid and give every relative position module the whole grid as its window."""
    grids = yield from plan_grids(model, model.patch_embed, ctx)
    for rel_pos in (model.shared_rel_pos, *(block.attn.rel_pos for block in model.blocks)):
        if rel_pos is not None:
            yield from ctx.visit(rel_pos, window=grids.new)
