"""VisionTransformer and what is built from it: DeiT, hybrids, ViTamin, FlexiViT, DINOv2, SigLIP, CLIP …."""

from __future__ import annotations

from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import floor_div
from timm_resize.handlers.layers.patch_embed import SIZES, OwnInterpolation, plan_grids


@register(
    VisionTransformer,
    state="pos_embed (1, prefix + h*w, dim)",
    method="bicubic antialias; prefix tokens kept",
    sizes=SIZES,
    options=("patch_size",),
    guarded=True,
    examples={
        "vit_tiny_patch16_224": {"depth": 2},
        "deit_tiny_distilled_patch16_224": {"depth": 1},
        "deit3_small_patch16_224": {"depth": 1},
        "vit_small_patch14_reg4_dinov2": {"depth": 1, "embed_dim": 48, "num_heads": 2},
        "flexivit_small": {"depth": 1},
        "vit_tiny_r_s16_p8_224": {"depth": 1},
        "vitamin_small_224": {"depth": 1},
        "vit_base_patch16_gap_224": {"depth": 1, "embed_dim": 96, "num_heads": 3},
    },
)
def plan_vision_transformer(model: VisionTransformer, ctx: Context) -> Changes:
    """Resample the position embedding from the old patch grid to the new.

    With `dynamic_img_size` the forward resamples from `patch_embed.grid_size`, so both are set together.
    """
    own, corners = _checkpoint_interpolation(model) if ctx.request.constructing else (OwnInterpolation(), None)
    embed = model.patch_embed
    grids = yield from plan_grids(model, embed, ctx, **own)
    if not getattr(embed, "strict_img_size", True) and not model.dynamic_img_size and model.pos_embed is not None:
        patch = ctx.request.patch_size or tuple(embed.patch_size)
        yield from ctx.guard(embed.proj, lambda size: floor_div(size, patch))  # forward has but the count of tokens
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    how = ctx.pos_embed(grids.old, grids.new, prefix, align_corners=corners, **own)
    yield from ctx.parameter(model, "pos_embed", how, optional=True)


def _checkpoint_interpolation(model: VisionTransformer) -> tuple[OwnInterpolation, bool | None]:
    """Return how stock's checkpoint filter interpolates this variant, and whether corner to corner.

    FlexiViT and RADIO weights were trained against bilinear resampling without antialias, and stock picks by
    the name of the variant, so the architecture recorded in `pretrained_cfg` is the only place to ask. Stock's
    `set_input_size` makes no difference between variants.

    Source: timm/models/vision_transformer.py, _create_vision_transformer.
    """
    variant = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or ""
    if "flexi" not in variant and "radio" not in variant:
        return {}, None
    aligned = getattr(vision_transformer, "_RADIO_ALIGN_CORNERS", ())  # timm before 1.0.26 has none
    corners = any(name in variant for name in aligned)
    return {"mode": "bilinear", "antialias": False}, corners or None
