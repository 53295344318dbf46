"""Rotary position embeddings: the sin/cos caches of a fixed grid; the frequencies do not depend on the size."""

from __future__ import annotations

from typing import TypeAlias

from timm.layers.pos_embed_sincos import RotaryEmbedding, RotaryEmbeddingCat
from torch import nn

from timm_resize.core.context import Changes, Context, Reinitialise
from timm_resize.core.registry import register
from timm_resize.errors import UnsupportedModelError
from timm_resize.geometry import Size

Rope: TypeAlias = RotaryEmbedding | RotaryEmbeddingCat  # or a newer one, of the same attributes

CACHES = ("pos_embed_sin", "pos_embed_cos", "pos_embed", "pos_embed_cached", "t_x", "t_y")
"""Buffers with a row per cell of the grid; each class has one or two of them."""


def plan_rope(rope: Rope, ctx: Context, *, feat_shape: Size | None = None) -> Changes:
    """Set `feat_shape`, the grid, and let the module refill its caches; what scales positions onto a grid is kept.

    `ref_feat_shape` is the pretraining grid onto which positions are scaled; no image size changes it. DINOv3's
    coordinates span [-1, 1] at every grid.

    Source: EVA-02, arXiv 2303.11331, section 2.
    """
    if rope.feat_shape is None or feat_shape == tuple(rope.feat_shape):
        return  # without a feat_shape there is no cache: it is computed from the grid in each forward
    if feat_shape is None:
        raise UnsupportedModelError(
            f"{type(ctx.root).__name__}: {ctx.path(rope)} is a {type(rope).__name__}, whose grid only its model "
            "knows. Write a handler for the model with @timm_resize.register."
        )
    yield from ctx.attribute(rope, feat_shape=feat_shape)
    for name in CACHES:
        cache = getattr(rope, name, None)
        if cache is not None:
            yield from ctx.buffer(rope, name, (feat_shape[0] * feat_shape[1], *cache.shape[1:]), Reinitialise())


for _cls, _state, _method in (
    (RotaryEmbedding, "pos_embed_sin, pos_embed_cos (h*w, dim)", "rebuilt; ref_feat_shape kept"),
    (RotaryEmbeddingCat, "pos_embed (h*w, 2*dim)", "rebuilt; ref_feat_shape kept"),
    ("timm.layers.pos_embed_sincos.RotaryEmbeddingDinoV3", "pos_embed_cached (h*w, 2*dim)", "rebuilt"),
    ("timm.layers.pos_embed_sincos.RotaryEmbeddingMixed", "t_x, t_y (h*w,)", "rebuilt; the learned freqs kept"),
):
    register(_cls, state=_state, method=_method)(plan_rope)


@register("timm.layers.pos_embed_sincos.RotaryEmbeddingMRope")
def plan_rope_mrope(rope: nn.Module, ctx: Context, *, feat_shape: Size | None = None) -> Changes:
    """Change nothing: it is computed from the grid in each forward."""
    yield from ()
