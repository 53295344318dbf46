"""open_clip's models of an image and a text tower."""

from __future__ import annotations

from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

from timm_resize.core.context import Changes, Context, current_size
from timm_resize.core.registry import register
from timm_resize.geometry import Size


def image_size(model: nn.Module) -> Size | None:
    """Return the size (H, W) of the image tower."""
    return current_size(model.get_submodule("visual"))


@register(
    CLIP,
    CustomTextCLIP,
    state="that of the image tower",
    method="as the image tower's",
    sizes="as the image tower's",
    size=image_size,
)
def plan_clip(model: nn.Module, ctx: Context) -> Changes:
    """Resize the image tower; nothing else depends on the size of the image."""
    yield from ctx.visit(model.get_submodule("visual"))
