"""TimmBackbone: a timm model's features, in a configuration that has no word for their image size."""

from __future__ import annotations

from transformers.models.timm_backbone.modeling_timm_backbone import TimmBackbone

from timm_resize.core.context import Changes, Context, current_size, find_model
from timm_resize.core.registry import register
from timm_resize.geometry import Size


def image_size(model: TimmBackbone) -> Size | None:
    """Return the size (H, W) of the timm model inside."""
    return current_size(find_model(model._backbone))


@register(
    TimmBackbone,
    state="that of the timm model inside",
    method="as the timm model's",
    sizes="as the timm model's",
    size=image_size,
)
def plan_timm_backbone(model: TimmBackbone, ctx: Context) -> Changes:
    """Resize the timm model."""
    changed = False
    for change in ctx.visit(find_model(model._backbone)):
        changed |= change.kind != "attribute"
        yield change
    if changed:
        ctx.note("TimmBackbone has no argument for an image size: from_pretrained opens it at the timm model's own.")
