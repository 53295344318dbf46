"""Models in which nothing depends on the image size, and whose halvings or windows must come out even."""

from __future__ import annotations

from timm.models.csatv2 import CSATv2
from timm.models.dla import DLA
from timm.models.hieradet_sam2 import HieraDet
from timm.models.hrnet import HighResolutionNet
from timm.models.tresnet import TResNet
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import ceil_div, text
from timm_resize.handlers.layers.sizes import check_size, check_small


@register(CSATv2, sizes="multiples of 8, at least 64")
def plan_csatv2(model: CSATv2, ctx: Context) -> Changes:
    """Check the 8x8 blocks of the cosine transform, and the strides after it."""
    check_size(ctx, minimum=64, multiple=8, why="the block of the cosine transform")
    yield from ()


@register(TResNet, sizes="multiples of 4, at least 28")
def plan_tresnet(model: TResNet, ctx: Context) -> Changes:
    """Check the space-to-depth blocks of the stem."""
    check_size(ctx, multiple=4, why="the stem's space-to-depth block")
    check_small(model, ctx)
    yield from ()


@register(DLA, sizes="⌈side / 2⌉ % 16")
def plan_dla(model: DLA, ctx: Context) -> Changes:
    """Check that no map is odd where a convolution rounds up and a pool rounds down."""
    _check_map(ctx, 2, 16)
    yield from ()


@register(HighResolutionNet, HieraDet, sizes="⌈side / 4⌉ % 8")
def plan_quartered(model: nn.Module, ctx: Context) -> Changes:
    """Check that the stem's map halves evenly to the coarsest branch (HRNet), or fills the windows (HieraDet)."""
    _check_map(ctx, 4, 8)
    yield from ()


def _check_map(ctx: Context, stride: int, multiple: int) -> None:
    size = ceil_div(ctx.new_size, stride)
    if size[0] % multiple or size[1] % multiple:
        ctx.invalid(f"gives a {text(size)} map at stride {stride}, not divisible by {multiple}")
