"""Attention pooling with a position embedding of its own."""

from __future__ import annotations

from timm.layers import AttentionPool2d, AttentionPoolLatent

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.errors import UnsupportedModelError
from timm_resize.geometry import Size


@register(AttentionPool2d, state="pos_embed (1 + h*w, dim)", method="bicubic antialias; the pooled token's row kept")
def plan_attention_pool_2d(pool: AttentionPool2d, ctx: Context, *, feat_size: Size) -> Changes:
    """Resample the position embedding to the map `feat_size` that the pool will see.

    Its forward resamples from `pool.feat_size` whenever the map differs; after this there is nothing to resample.
    """
    yield from ctx.parameter(pool, "pos_embed", ctx.pos_embed(tuple(pool.feat_size), feat_size, prefix=1, dim=0))
    yield from ctx.attribute(pool, feat_size=feat_size, seq_len=feat_size[0] * feat_size[1])


@register(AttentionPoolLatent, state="pos_embed (prefix + h*w, dim), where it has one", method="bicubic antialias")
def plan_attention_pool_latent(
    pool: AttentionPoolLatent, ctx: Context, *, old: Size | None = None, new: Size | None = None, prefix: int = 0
) -> Changes:
    """Resample the position embedding, if any, from the grid `old` to `new`; `prefix` tokens come before them."""
    if pool.pos_embed is None:
        return
    if old is None or new is None:
        raise UnsupportedModelError(
            f"{type(ctx.root).__name__}: {ctx.path(pool)} has a position embedding of {pool.feat_size} tokens, whose "
            "grid only its model knows. Write a handler for the model with @timm_resize.register."
        )
    yield from ctx.parameter(pool, "pos_embed", ctx.pos_embed(old, new, prefix=prefix, dim=0))
    yield from ctx.attribute(pool, feat_size=prefix + new[0] * new[1])
