"""Models in which nothing depends on the image size, and whose smallest size depends on their configuration."""

from __future__ import annotations

from timm.models.convmixer import ConvMixer
from timm.models.convnext import ConvNeXt
from timm.models.cspnet import CspNet
from timm.models.densenet import DenseNet
from timm.models.edgenext import EdgeNeXt
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.focalnet import FocalNet
from timm.models.ghostnet import GhostNet
from timm.models.metaformer import MetaFormer
from timm.models.mobilenetv3 import MobileNetV3, MobileNetV3Features
from timm.models.nasnet import NASNetALarge
from timm.models.nextvit import NextViT
from timm.models.pnasnet import PNASNet5Large
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.resnetv2 import ResNetV2
from timm.models.senet import SENet
from timm.models.sequencer import Sequencer2d
from timm.models.twins import Twins
from timm.models.vovnet import VovNet
from timm.models.xception import Xception
from timm.models.xcit import Xcit
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.layers.sizes import check_small


@register(
    ConvMixer,
    ConvNeXt,
    CspNet,
    DenseNet,
    EdgeNeXt,
    EfficientNetFeatures,
    FocalNet,
    GhostNet,
    MetaFormer,
    MobileNetV3,
    MobileNetV3Features,
    NASNetALarge,
    NextViT,
    PNASNet5Large,
    PyramidVisionTransformerV2,
    ResNetV2,
    SENet,
    Sequencer2d,
    Twins,
    VovNet,
    Xception,
    Xcit,
    sizes="any that leaves a cell after the strides (at most 33)",
)
def plan_small_sizes(model: nn.Module, ctx: Context) -> Changes:
    """Check small sizes by what forward can do; change nothing."""
    check_small(model, ctx)
    yield from ()
