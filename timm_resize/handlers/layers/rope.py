"""Rotary position embeddings: the sin/cos caches of a fixed grid; the frequencies do not depend on the size."""

from __future__ import annotations

from typing import Any

from timm.layers.pos_embed_sincos import (
    RotaryEmbedding,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from torch import nn

from timm_resize.core.context import Changes, Context, Reinitialise
from timm_resize.core.registry import register
from timm_resize.errors import UnsupportedModelError
from timm_resize.geometry import Size


@register(RotaryEmbedding, state="pos_embed_sin, pos_embed_cos (h*w, dim)", method="rebuilt; ref_feat_shape kept")
def plan_rope(rope: RotaryEmbedding, ctx: Context, *, feat_shape: Size | None = None) -> Changes:
    """Rebuild the separate sine and cosine caches for the grid `feat_shape`."""
    yield from _rebuild(rope, ctx, feat_shape, "pos_embed_sin", "pos_embed_cos")


@register(RotaryEmbeddingCat, state="pos_embed (h*w, 2*dim)", method="rebuilt; ref_feat_shape kept")
def plan_rope_cat(rope: RotaryEmbeddingCat, ctx: Context, *, feat_shape: Size | None = None) -> Changes:
    """Rebuild the concatenated sine and cosine cache for the grid `feat_shape`.

    `ref_feat_shape` is the pretraining grid onto which positions are scaled; no image size changes it.

    Source: EVA-02, arXiv 2303.11331, section 2.
    """
    yield from _rebuild(rope, ctx, feat_shape, "pos_embed")


@register(RotaryEmbeddingDinoV3, state="pos_embed_cached (h*w, 2*dim)", method="rebuilt")
def plan_rope_dinov3(rope: RotaryEmbeddingDinoV3, ctx: Context, *, feat_shape: Size | None = None) -> Changes:
    """Rebuild the cache, whose coordinates span [-1, 1] at every grid."""
    yield from _rebuild(rope, ctx, feat_shape, "pos_embed_cached")


@register(RotaryEmbeddingMixed, state="t_x, t_y (h*w,)", method="rebuilt; the learned freqs kept")
def plan_rope_mixed(rope: RotaryEmbeddingMixed, ctx: Context, *, feat_shape: Size | None = None) -> Changes:
    """Rebuild the positions that the learned frequencies multiply."""
    yield from _rebuild(rope, ctx, feat_shape, "t_x", "t_y")


@register(RotaryEmbeddingMRope)
def plan_rope_mrope(rope: RotaryEmbeddingMRope, ctx: Context, *, feat_shape: Size | None = None) -> Changes:
    """Change nothing: it is computed from the grid in each forward."""
    yield from ()


def _rebuild(rope: nn.Module, ctx: Context, feat_shape: Size | None, *names: str) -> Changes:
    """Set `feat_shape` and let the module refill the buffers `names`."""
    old: Any = rope.feat_shape
    if old is None or feat_shape == tuple(old):
        return  # without a feat_shape there is no cache: it is computed from the grid in each forward
    if feat_shape is None:
        raise UnsupportedModelError(
            f"{type(ctx.root).__name__}: {ctx.path(rope)} is a {type(rope).__name__}, whose grid only its model "
            "knows. Write a handler for the model with @timm_resize.register."
        )
    yield from ctx.attribute(rope, feat_shape=feat_shape)
    for name in names:
        shape = (feat_shape[0] * feat_shape[1], *rope.get_buffer(name).shape[1:])
        yield from ctx.buffer(rope, name, shape, Reinitialise())
