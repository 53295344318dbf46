"""Depth Anything: a DINOv2 backbone, whose handlers do it all, and heads that go by the image that they are given."""

from __future__ import annotations

from transformers.models.depth_anything.modeling_depth_anything import DepthAnythingPreTrainedModel

from timm_resize.core.registry import register
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model

register(
    DepthAnythingPreTrainedModel,
    state="its backbone's; config.backbone_config.image_size",
    method="its backbone's",
    sizes="its backbone's",
    size=image_size,
)(plan_model)
