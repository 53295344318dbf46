"""Transformers that take a grid with each image: NaFlexViT, Qwen3-VL, Gemma 4, DeepSeek."""

from __future__ import annotations

from timm.layers import PatchEmbed
from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.gemma4_vit import Gemma4VitClassifier, Gemma4VitEncoder
from timm.models.naflexvit import NaFlexVit
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.size_free import check_size


@register(NaFlexVit, sizes="multiples of the patch")
def plan_naflexvit(model: NaFlexVit, ctx: Context) -> Changes:
    """Check the patches; the position embedding is resampled to each image's grid in forward."""
    embeds = model.embeds
    if not getattr(embeds, "dynamic_img_pad", False):
        check_size(ctx, multiple=max(embeds.patch_size), why="the patch size")
    yield from ()


@register(
    Qwen3VitEncoder,
    Qwen3VitClassifier,
    Gemma4VitEncoder,
    Gemma4VitClassifier,
    DeepseekVitEncoder,
    DeepseekVitClassifier,
    sizes="multiples of the patch, times the side of the tokens that are merged",
)
def plan_grid_encoder(model: nn.Module, ctx: Context) -> Changes:
    """Check the patches and what merges them; set the patch embedding's record of the size."""
    encoder: Qwen3VitEncoder | Gemma4VitEncoder | DeepseekVitEncoder = getattr(model, "encoder", model)
    embed = encoder.patch_embed
    check_size(ctx, multiple=max(embed.patch_size) * _merged(encoder), why="the patches and what merges them")
    if isinstance(embed, PatchEmbed):
        yield from ctx.visit(embed)


def _merged(encoder: Qwen3VitEncoder | Gemma4VitEncoder | DeepseekVitEncoder) -> int:
    """Return how many patches a side become one token; DeepSeek's aligner pads instead, and needs nothing."""
    if isinstance(encoder, Qwen3VitEncoder) and encoder.merger is not None:
        return int(encoder.merge_size)
    if isinstance(encoder, Gemma4VitEncoder) and encoder.global_pool == "soft":
        return int(encoder.pooling_kernel_size)
    return 1
