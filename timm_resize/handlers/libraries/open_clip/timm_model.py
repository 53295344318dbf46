"""open_clip's tower around a timm model."""

from __future__ import annotations

from open_clip.timm_model import TimmModel
from timm.layers import AttentionPool2d

from timm_resize.core.context import Changes, Context, current_size
from timm_resize.core.registry import handler_for, register
from timm_resize.geometry import Size
from timm_resize.handlers.libraries.open_clip import towers


def has_state(tower: TimmModel) -> bool:
    """Whether something in the timm model depends on the size."""
    handler = handler_for(type(tower.trunk))
    return handler is None or bool(handler.state)


def image_size(tower: TimmModel) -> Size | None:
    """Return the size (H, W) on record, None where the timm model inside is at another."""
    size = towers.image_size(tower)
    return size if not has_state(tower) or current_size(tower.trunk) == size else None


@register(
    TimmModel,
    state="that of the timm model inside; pos_embed of an attention pool after it",
    method="as the timm model's",
    sizes="as the timm model's",
    size=image_size,
)
def plan_timm_model(tower: TimmModel, ctx: Context) -> Changes:
    """Resize the timm model, and an attention pool of open_clip's after a convolutional one."""
    yield from ctx.visit(tower.trunk)
    pool = tower.head._modules.get("pool")
    if isinstance(pool, AttentionPool2d) and not has_state(tower):
        channels = next(p.shape[1] for p in tower.trunk.parameters() if p.dim() == 4)
        yield from ctx.visit(pool, feat_size=ctx.output_size(tower.trunk, channels=channels))
    yield from towers.record_size(tower, ctx)
