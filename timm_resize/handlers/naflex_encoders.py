"""Transformers that take a grid with each image: NaFlexViT, Qwen3-VL, Gemma 4, DeepSeek."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.size_free import check_size


@register("timm.models.naflexvit.NaFlexVit", sizes="multiples of the patch")
def plan_naflexvit(model: Any, ctx: Context) -> Changes:
    """Check the patches; the position embedding is resampled to each image's grid in forward."""
    embeds = model.embeds
    if not getattr(embeds, "dynamic_img_pad", False):
        check_size(ctx, multiple=max(embeds.patch_size), why="the patch size")
    yield from ()


@register(
    "timm.models.qwen3_vit.Qwen3VitEncoder",
    "timm.models.qwen3_vit.Qwen3VitClassifier",
    "timm.models.gemma4_vit.Gemma4VitEncoder",
    "timm.models.gemma4_vit.Gemma4VitClassifier",
    "timm.models.deepseek_vit.DeepseekVitEncoder",
    "timm.models.deepseek_vit.DeepseekVitClassifier",
    sizes="multiples of the patch, times the side of the tokens that are merged",
)
def plan_grid_encoder(model: nn.Module, ctx: Context) -> Changes:
    """Check the patches and what merges them; set the patch embedding's record of the size."""
    encoder: Any = getattr(model, "encoder", model)
    embed = encoder.patch_embed
    check_size(ctx, multiple=max(embed.patch_size) * _merged(encoder), why="the patches and what merges them")
    if isinstance(embed, PatchEmbed):
        yield from ctx.visit(embed)


def _merged(encoder: Any) -> int:
    """Return how many patches a side become one token; DeepSeek's aligner pads instead, and needs nothing."""
    if getattr(encoder, "merger", None) is not None:  # Qwen3-VL's
        return int(encoder.merge_size)
    if getattr(encoder, "global_pool", "") == "soft":  # Gemma 4's
        return int(encoder.pooling_kernel_size)
    return 1
