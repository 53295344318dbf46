"""CaiT: a position embedding over the patches alone; the class token joins in the last blocks."""

from __future__ import annotations

from timm.models.cait import Cait

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register


@register(
    Cait,
    state="pos_embed (1, h*w, dim), no prefix",
    method="bicubic antialias",
    sizes="at least one patch; pixels past the last patch are dropped, with a warning",
    options=("patch_size",),
    examples={"cait_xxs24_224": {"depth": 1, "depth_token_only": 1}},
)
def plan_cait(model: Cait, ctx: Context) -> Changes:
    """Resample the position embedding from the old patch grid to the new."""
    old, new, reduction = yield from ctx.visit(model.patch_embed)
    yield from ctx.parameter(model, "pos_embed", ctx.pos_embed(old, new))
    yield from ctx.attribute(model, feature_info=[dict(i, reduction=reduction) for i in model.feature_info])
