"""smp's networks on a `tu-` encoder: what builds them stands in the configuration that they save."""

from __future__ import annotations

from segmentation_models_pytorch.base import SegmentationModel
from torch import nn

from timm_resize.core.context import Changes, Context, current_size, find_model, model_handler
from timm_resize.core.registry import register, takes_img_size
from timm_resize.geometry import Size


def image_size(model: nn.Module) -> Size | None:
    """Return the size (H, W) of the timm model inside."""
    return current_size(find_model(model.get_submodule("encoder")))


@register(
    SegmentationModel,
    state="that of the timm encoder; config",
    method="as the encoder's",
    sizes="as the encoder's",
    size=image_size,
)
def plan_segmentation(model: SegmentationModel, ctx: Context) -> Changes:
    """Resize the encoder, and write into the configuration what builds it at the size.

    `from_pretrained` gives what it does not know to the encoder, and that to `timm.create_model`.
    """
    inner = find_model(model.get_submodule("encoder"))
    yield from ctx.visit(inner)
    handler, config = model_handler(inner), getattr(model, "_hub_mixin_config", None)
    if config is not None and handler is not None and takes_img_size(handler.cls):
        given = {**ctx.model_args, "img_size": ctx.new_size}
        yield from ctx.attribute(model, _hub_mixin_config={**config, **given})
