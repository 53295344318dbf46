"""Hiera: a position embedding that repeats per mask unit, and tokens unrolled unit by unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from timm.models.hiera import Hiera
from torch import Tensor

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.errors import UnsupportedModelError
from timm_resize.geometry import Size, divisible, floor_div, text
from timm_resize.handlers.layers.conv_size import map_size
from timm_resize.resample import AxisMap, Resample


@register(
    Hiera,
    state="pos_embed (1, h*w, dim); token grids of the unroll and reroll steps",
    method="mean over mask units tiled, the residual bicubic antialias",
    sizes="token grid (a quarter, rounded up) in whole mask units of 8x8",
    guarded=True,
    examples={
        "hiera_tiny_224": {"stages": (1, 1, 1, 1), "embed_dim": 32},
        "hiera_small_abswin_256": {"stages": (1, 1, 1, 1), "embed_dim": 32},
        "hiera_base_plus_224": {"stages": (1, 2, 1, 1), "embed_dim": 32},
    },
)
def plan_hiera(model: Hiera, ctx: Context) -> Changes:
    """Resample the position embedding and set every token grid.

    With `pos_embed_win` the embedding is assembled from two fixed tables in each forward, so only the grids change.
    """
    if len(model.patch_stride) != 2:
        raise UnsupportedModelError(
            f"{type(ctx.root).__name__}: patch_stride={tuple(model.patch_stride)} is of a video model. "
            "Only models of images (H, W) can be resized."
        )
    grid, unit = map_size(model.patch_embed.proj, ctx.new_size), _unit(model)
    if min(grid) < 1 or not divisible(grid, unit):
        ctx.invalid(f"gives a {text(grid)} token grid, not whole mask units of {text(unit)}")
    if grid != (counted := floor_div(ctx.new_size, tuple(model.patch_stride))):
        ctx.warn(
            f"img_size={ctx.new_size} is padded to a {text(grid)} token grid. Stock timm's constructor counts "
            f"{text(counted)}, so a checkpoint of this size loads only through timm_resize."
        )
    yield from ctx.guard(model.patch_embed.proj, partial(map_size, model.patch_embed.proj))
    if model.pos_embed_win is None:
        old = tuple(model.tokens_spatial_shape)
        residual = ctx.pos_embed(old, grid)
        window = tuple(model.mask_unit_size)
        yield from ctx.parameter(model, "pos_embed", TiledWindow(residual.axes, dim=1, flat=True, window=window))
    units = list(floor_div(grid, tuple(model.mask_unit_size)))
    yield from ctx.attribute(model, tokens_spatial_shape=list(grid), mask_spatial_shape=units)
    yield from ctx.attribute(model.unroll, size=list(grid))
    schedule = {i: (list(left), _pooled(grid, model, len(left))) for i, (left, _) in model.reroll.schedule.items()}
    yield from ctx.attribute(model.reroll, size=list(grid), schedule=schedule)


def _unit(model: Hiera) -> Size:
    """Return the cells that both a mask unit and all strides of the unroll divide."""
    h, w = (
        math.lcm(side, math.prod(stride[axis] for stride in model.unroll.schedule))
        for axis, side in enumerate(model.mask_unit_size)
    )
    return h, w


def _pooled(grid: Size, model: Hiera, left: int) -> list[int]:
    """Return the token grid of a block that has `left` strides still to undo."""
    done: Sequence[Size] = model.unroll.schedule[: len(model.unroll.schedule) - left]
    return [side // math.prod(stride[axis] for stride in done) for axis, side in enumerate(grid)]


@dataclass(frozen=True)
class TiledWindow(Resample):
    """A position embedding split into a part that repeats per window and a residual.

    The first is the mean over all windows, tiled over the new grid; the second is interpolated by `axes`. So
    x' = T'x + R(x - Tx) with T the mean tiled over the old grid and T' over the new one: a sum of three maps,
    each separable. Interpolating x itself would stretch the windows' pattern, which attention within windows of a
    fixed size then reads at the wrong places.

    Source: Window Attention is Bugged, arXiv 2311.05613, section 3.
    """

    window: Size = (8, 8)

    @property
    def label(self) -> str:
        """The method's name for tables."""
        return f"window tiled, residual {super().label}"

    def terms(self) -> tuple[tuple[float, Resample], ...]:
        """Return the separable maps and their signs."""
        old = [TileMean(a.old, a.old, w) for a, w in zip(self.axes, self.window, strict=True)]
        new = [TileMean(a.old, a.new, w) for a, w in zip(self.axes, self.window, strict=True)]
        both = [Product(t.old, a.new, t, a) for t, a in zip(old, self.axes, strict=True)]
        signed = ((1.0, new), (1.0, self.axes), (-1.0, both))
        return tuple((sign, Resample(tuple(axes), dim=self.dim, flat=self.flat)) for sign, axes in signed)

    def _apply(self, tensor: Tensor) -> Tensor:
        out = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
        for sign, term in self.terms():
            out = out + sign * term._grid(tensor)
        return out

    def _magnitude(self) -> Resample:
        return _TiledMagnitude(self.axes, dim=self.dim, flat=self.flat, of=self)


@dataclass(frozen=True)
class _TiledMagnitude(Resample):
    """The map of squares that bounds a `TiledWindow`: by absolute entries, each row times its own sum."""

    of: TiledWindow = field(default_factory=lambda: TiledWindow(()))

    def _apply(self, tensor: Tensor) -> Tensor:
        squares = sums = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
        for _, term in self.of.terms():
            size = Resample(tuple(Absolute(a.old, a.new, a) for a in term.axes), dim=self.dim, flat=self.flat)
            squares = squares + size._grid(tensor)
            sums = sums + size._grid(torch.ones_like(tensor))
        return squares * sums


@dataclass(frozen=True)
class TileMean(AxisMap):
    """The mean over all windows of an axis, tiled over the new axis."""

    window: int

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        phase = torch.arange(self.new)[:, None] % self.window == torch.arange(self.old) % self.window
        return phase.double() / phase.sum(1, keepdim=True).clamp(min=1)  # 0 where no window reaches that far


@dataclass(frozen=True)
class Product(AxisMap):
    """One map of an axis after another."""

    inner: AxisMap
    outer: AxisMap

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        return self.outer.matrix() @ self.inner.matrix()


@dataclass(frozen=True)
class Absolute(AxisMap):
    """The absolute entries of another map."""

    of: AxisMap

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        return self.of.matrix().abs()
