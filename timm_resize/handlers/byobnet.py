"""ByobNet: convolutional networks, some with bottleneck, lambda, halo or bilinear attention or an attention pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers.attention_pool2d import AttentionPool2d
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer, rel_pos_indices
from timm.layers.non_local_attn import BatNonLocalAttn
from timm.models.byobnet import (
    BasicBlock,
    BottleneckBlock,
    ByobNet,
    DarkBlock,
    EdgeBlock,
    MobileOneBlock,
    RepVggBlock,
    SelfAttnBlock,
)
from torch import Tensor, nn

from timm_resize.core.context import Changes, Context, Rebuild
from timm_resize.core.registry import register
from timm_resize.geometry import Size, divisible, floor_div, text
from timm_resize.handlers.layers.conv_size import SPATIAL, map_size, parts
from timm_resize.handlers.size_free import check_forward
from timm_resize.resample import AxisMap, Resample
from timm_resize.resample.sampling import sample_matrix

ATTENTION = (BottleneckAttn, LambdaLayer, HaloAttn, BatNonLocalAttn)

RESIDUAL = (BasicBlock, BottleneckBlock, DarkBlock, EdgeBlock, SelfAttnBlock)

_NARROW = {"width_factor": 0.25}


@register(
    ByobNet,
    state="height_rel, width_rel of bottleneck attention; pos_emb of lambda layers; pos_embed of an attention pool",
    method="linear, corner to corner; lambda tables scaled by M/M'; the pool's bicubic antialias",
    sizes="where both branches of every block agree, and maps divide into the blocks of halo and bilinear attention",
    guarded=True,
    examples={
        "resnet32ts": _NARROW,
        "repvgg_a0": _NARROW,
        "botnet26t_256": _NARROW,
        "lambda_resnet26rpt_256": _NARROW,
        "lamhalobotnet50ts_256": _NARROW,
        "halonet26t": _NARROW,
        "bat_resnext26ts": {"width_factor": 0.5},
        "resnet50_clip": _NARROW,
    },
)
def plan_byobnet(model: ByobNet, ctx: Context) -> Changes:
    """Follow the map through every layer as forward does, where stock's constructor halves it rounding down."""
    if any(isinstance(m, (RepVggBlock, MobileOneBlock)) for m in model.modules()):
        check_forward(model, ctx)  # parallel branches, which `_follow` does not know; no attention in stock's
        return
    layers = [m for name, m in parts(model) if name not in ("head", "global_pool")]  # also of a wrapper
    size = ctx.new_size
    for layer in layers:
        size = yield from _follow(layer, ctx, size)
    head = getattr(model, "head", None)
    if isinstance(head, AttentionPool2d):
        yield from ctx.visit(head, feat_size=size)
    if isinstance(model, ByobNet) and any(map(_has_table, model.modules())):
        counted = floor_div(ctx.new_size, model.feature_info[-1]["reduction"])
        if counted != size:
            ctx.warn(
                f"img_size={ctx.new_size} gives a {text(size)} last map. Stock timm's constructor counts "
                f"{text(counted)}, so a checkpoint of this size loads only through timm_resize."
            )


def _has_table(module: nn.Module) -> bool:
    lambdas = isinstance(module, LambdaLayer) and module.pos_emb is not None
    return lambdas or isinstance(module, (BottleneckAttn, AttentionPool2d))


def _follow(module: nn.Module, ctx: Context, size: Size) -> Changes:
    """Visit the attention inside `module` in forward's order; returns the map that it makes of a map of `size`."""
    if isinstance(module, ATTENTION):
        size = yield from ctx.visit(module, feat_size=size)
    elif isinstance(module, RESIDUAL):
        size = yield from _residual(module, ctx, size)
    elif isinstance(module, SPATIAL):
        size = map_size(module, size)
    else:
        for _, child in parts(module):
            size = yield from _follow(child, ctx, size)
    if min(size) < 1:
        ctx.invalid(f"leaves no map for {ctx.path(module)}")
    return size


def _residual(block: BottleneckBlock, ctx: Context, size: Size) -> Changes:
    """Follow a block's main branch, and check that its shortcut comes out alike.

    Channel attention (`attn`, `attn_last`) computes on pooled maps and gives the map back as it was.
    """
    main = size
    for name, child in parts(block):
        channel = name in ("attn", "attn_last") and not isinstance(child, ATTENTION)
        if name != "shortcut" and not channel:
            main = yield from _follow(child, ctx, main)
    if block.shortcut is not None:
        short = yield from _follow(block.shortcut, ctx, size)
        if short != main:
            ctx.invalid(f"gives a {text(main)} map in {ctx.path(block)} and a {text(short)} one on its shortcut")
    return main


@register(
    BottleneckAttn,
    state="pos_embed.height_rel (2h-1, dim), pos_embed.width_rel (2w-1, dim)",
    method="linear, corner to corner",
)
def plan_bottleneck_attn(attention: BottleneckAttn, ctx: Context, *, feat_size: Size) -> Changes:
    """Resample both tables over relative offsets for a map of `feat_size`; returns the map after the pool."""
    embed = attention.pos_embed
    options = ctx.interpolation(mode="bilinear")
    for name, side in zip(("height_rel", "width_rel"), feat_size, strict=True):
        rows = int(getattr(embed, name).shape[0])
        yield from ctx.parameter(embed, name, Resample((RelativeOffset(rows, 2 * side - 1, **options),)))
    yield from ctx.attribute(embed, height=feat_size[0], width=feat_size[1])
    return map_size(attention.pool, feat_size)


@register(LambdaLayer, state="pos_emb (2h-1, 2w-1, dim), rel_pos_indices", method="linear, scaled by M/M'")
def plan_lambda_layer(layer: LambdaLayer, ctx: Context, *, feat_size: Size) -> Changes:
    """Resample the table over relative offsets, where there is one; returns the map after the pool.

    With a radius `r` positions are a convolution, which takes any map.
    """
    if layer.pos_emb is not None and tuple(layer.feat_size) != feat_size:
        options = ctx.interpolation(mode="bilinear")
        sides = zip(layer.feat_size, feat_size, strict=True)
        axes = tuple(SummedOffset(2 * old - 1, 2 * new - 1, **options) for old, new in sides)
        yield from ctx.parameter(layer, "pos_emb", Resample(axes))
        cells = feat_size[0] * feat_size[1]
        yield from ctx.buffer(layer, "rel_pos_indices", (2, cells, cells), Rebuild(relative_indices, (feat_size,)))
        yield from ctx.attribute(layer, feat_size=feat_size)
    if layer.pos_emb is not None:  # the table fits every map of as many cells
        yield from ctx.guard(layer, lambda size: size, feat_size)
    return map_size(layer.pool, feat_size)


def relative_indices(size: Size, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the table row and column of every pair of cells (2, h*w, h*w), by stock's own function."""
    return rel_pos_indices(size, device=device).to(dtype)


@register(HaloAttn, BatNonLocalAttn, sizes="maps divisible by block_size")
def plan_blocked_attention(attention: HaloAttn | BatNonLocalAttn, ctx: Context, *, feat_size: Size) -> Changes:
    """Check that blocks divide the map; tables are of one window, or none. Returns the map after stride and pool."""
    halo = isinstance(attention, HaloAttn)
    block = attention.block_size if halo else attention.ba.block_size
    if not divisible(feat_size, block):
        ctx.invalid(f"gives a {text(feat_size)} map to {ctx.path(attention)}, not divisible by its block_size={block}")
    yield from ()
    return map_size(attention.pool, floor_div(feat_size, attention.block_stride)) if halo else feat_size


@dataclass(frozen=True)
class RelativeOffset(AxisMap):
    """A table over relative offsets, 2*cells - 1 of them, corner to corner with offset 0 kept bit for bit.

    Where it shrinks with `antialias` the kernel is as wide as the new spacing, narrower towards the corners: cut on
    one side it would shift the row.
    """

    LABEL = "{mode} corner to corner"

    mode: str = "bilinear"
    antialias: bool = True

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        last = self.old - 1
        spacing = last / (self.new - 1) if self.new > 1 else 0.0
        offset = torch.arange(self.new, dtype=torch.float64) - (self.new - 1) / 2
        positions = (offset * spacing + last / 2).clamp(0, last)
        edge = torch.minimum(positions, last - positions)
        matrix = sample_matrix(
            positions, self.old, spacing=edge.clamp(max=spacing), mode=self.mode, antialias=self.antialias
        )
        matrix[self.new // 2] = 0.0
        matrix[self.new // 2, self.old // 2] = 1.0
        return matrix


@dataclass(frozen=True)
class SummedOffset(RelativeOffset):
    """A table over relative offsets that is summed over all cells: also scaled by old/new cells.

    A lambda layer adds table * value over every cell without normalising, so on a map of M' cells instead of M the
    table of the same function gives a sum M'/M as large; the scale, one factor per axis, keeps it.

    Source: LambdaNetworks, arXiv 2102.08602, section 3.1 (position lambdas).
    """

    LABEL = "{mode} corner to corner, times M/M'"

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        return super().build() * ((self.old + 1) / (self.new + 1))
