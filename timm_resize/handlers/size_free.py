"""Models in which nothing depends on the image size, and whose forward takes every size in eval mode."""

from __future__ import annotations

from timm.models.cpubone import CPUBone
from timm.models.cspnext import CspNext
from timm.models.davit import DaVit
from timm.models.dpn import DPN
from timm.models.efficientnet import EfficientNet
from timm.models.efficientvim import EfficientViM
from timm.models.efficientvit_mit import EfficientVit, EfficientVitLarge
from timm.models.fastvit import FastVit
from timm.models.hgnet import HighPerfGpuNet
from timm.models.iformer import IFormer
from timm.models.lcnetv2 import LCNetV2
from timm.models.lowformer import LowFormer
from timm.models.mambaout import MambaOut
from timm.models.mobilenetv5 import MobileNetV5, MobileNetV5Encoder
from timm.models.nfnet import NormFreeNet
from timm.models.regnet import RegNet
from timm.models.repghost import RepGhostNet
from timm.models.repvit import RepVit
from timm.models.rexnet import RexNet
from timm.models.selecsls import SelecSls
from timm.models.shvit import SHViT
from timm.models.starnet import StarNet
from timm.models.swiftformer import SwiftFormer
from timm.models.xception_aligned import XceptionAligned
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register


@register(
    CPUBone,
    CspNext,
    DaVit,
    DPN,
    EfficientNet,
    EfficientViM,
    EfficientVit,
    EfficientVitLarge,
    FastVit,
    HighPerfGpuNet,
    IFormer,
    LCNetV2,
    LowFormer,
    MambaOut,
    MobileNetV5,
    MobileNetV5Encoder,
    NormFreeNet,
    RegNet,
    RepGhostNet,
    RepVit,
    RexNet,
    SelecSls,
    SHViT,
    StarNet,
    SwiftFormer,
    XceptionAligned,
    sizes="any",
)
def plan_any_size(model: nn.Module, ctx: Context) -> Changes:
    """Change nothing: the weights and attributes are those of every size."""
    yield from ()
