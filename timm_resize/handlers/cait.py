"""CaiT: a position embedding over the patches alone; the class token joins in the last blocks."""

from __future__ import annotations

from timm.models.cait import Cait

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.layers.patch_embed import SIZES, plan_grids


@register(
    Cait,
    state="pos_embed (1, h*w, dim), no prefix",
    method="bicubic antialias",
    sizes=SIZES,
    options=("patch_size",),
    examples={"cait_xxs24_224": {"depth": 1, "depth_token_only": 1}},
)
def plan_cait(model: Cait, ctx: Context) -> Changes:
    """Resample the position embedding from the old patch grid to the new."""
    grids = yield from plan_grids(model, model.patch_embed, ctx)
    yield from ctx.parameter(model, "pos_embed", ctx.pos_embed(grids.old, grids.new))
