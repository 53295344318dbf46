"""ByobNet: plain ones hold nothing that depends on the size; those with attention over a fixed map are refused."""

from __future__ import annotations

from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.layers.non_local_attn import BatNonLocalAttn
from timm.models.byobnet import ByobNet
from torch import nn

from timm_resize.context import Changes, Context
from timm_resize.errors import UnsupportedModelError
from timm_resize.families._sizes import check_small
from timm_resize.registry import register

SIZED = (AttentionPool2d, RotAttentionPool2d, BatNonLocalAttn, BottleneckAttn, HaloAttn, LambdaLayer)


@register(
    ByobNet,
    sizes="any that leaves a cell after the strides; not yet with bottleneck, lambda, halo or pooling attention",
    examples={"regnetz_005": {}},
)
def plan_byobnet(model: ByobNet, ctx: Context) -> Changes:
    """Check what forward can do: small sizes, and every size where a branch that floors meets one that does not."""
    for path, module in model.named_modules():
        if isinstance(module, SIZED):
            raise UnsupportedModelError(
                f"{type(ctx.root).__name__}: {path} is a {type(module).__name__}, made for one map size, which cannot "
                "be resized yet. Use the model at its own size."
            )
    pools = any(isinstance(m, nn.AvgPool2d) for m in model.modules())
    check_small(model, ctx, below=max(ctx.new_size) + 1 if pools else 64)
    yield from ()
