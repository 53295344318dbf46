"""Models in which nothing depends on the image size, and whose forward takes every size from a minimum on."""

from __future__ import annotations

from timm.models.fasternet import FasterNet
from timm.models.inception_next import MetaNeXt
from timm.models.inception_resnet_v2 import InceptionResnetV2
from timm.models.inception_v3 import InceptionV3
from timm.models.inception_v4 import InceptionV4
from timm.models.rdnet import RDNet
from timm.models.vgg import VGG
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.layers.sizes import check_size


@register(FasterNet, MetaNeXt, RDNet, VGG, sizes="at least 32")
def plan_from_32(model: nn.Module, ctx: Context) -> Changes:
    """Check that the last of the floored halvings leaves a cell."""
    check_size(ctx, minimum=32)
    yield from ()


@register(InceptionResnetV2, InceptionV3, InceptionV4, sizes="at least 75")
def plan_inception(model: nn.Module, ctx: Context) -> Changes:
    """Check that the unpadded convolutions of the stem and of the reductions fit."""
    check_size(ctx, minimum=75)
    yield from ()
