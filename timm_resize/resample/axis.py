"""Linear maps along one axis of a grid, each a small (new, old) matrix.

Every resampling in this package is separable: one of these matrices per grid axis. That is
the fast path and the exact one, and adjoints, pseudo-inverses and tests come for free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from timm_resize.resample.sampling import sample_matrix

Source = tuple[int, ...]
"""The coordinates of one axis' old side as plain values, its number of samples first."""


@dataclass(frozen=True)
class AxisMap:
    """A linear map from `old` samples to `new` samples along one axis.

    Subclasses give `build`, the matrix in float64, and `LABEL`. They are values: equal fields, equal map.

    Attributes:
        LABEL: Short name of the method for tables; fields in braces.
        OLD_SIDE: The fields that say where the old samples are: what `source` holds and `rebase` exchanges.
    """

    LABEL: ClassVar[str] = ""
    OLD_SIDE: ClassVar[tuple[str, ...]] = ("old",)

    old: int
    new: int

    @property
    def is_identity(self) -> bool:
        """Whether the axis keeps its coordinates; when all axes of a map do, it copies every bit."""
        return self.old == self.new

    @property
    def source(self) -> Source:
        """The old side's coordinates as plain values, for `rebase`."""
        return tuple(getattr(self, name) for name in self.OLD_SIDE)

    def rebase(self, source: Source) -> AxisMap:
        """Return the map to the same new side from another old side."""
        return replace(self, **dict(zip(self.OLD_SIDE, source, strict=True)))

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """Return the (new, old) matrix, float64, cached: do not write to it."""
        return _cached(self)

    @property
    def label(self) -> str:
        """Short name of the method for tables."""
        return self.LABEL.format(**vars(self))


@lru_cache(maxsize=1024)
def _cached(axis: AxisMap) -> Tensor:
    # kept for later callers, so none of the first caller's modes or default device may stick to it
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        return axis.build()


@dataclass(frozen=True)
class Interpolate(AxisMap):
    """`torch.nn.functional.interpolate` along one axis, taken from its response to the identity.

    With `antialias` torch's cubic kernel has a = -0.5, without it a = -0.75, also when growing.
    The weights are those that torch computes in float32, as stock's results carry them (off by up to 1e-5 on large
    grids), or with `exact` those it computes in float64.
    """

    mode: str = "bicubic"
    antialias: bool = True
    align_corners: bool | None = None
    exact: bool = False

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64.

        The axis is laid along the width: antialiased interpolation of a one-column image along its height is wrong
        in torch 2.15 (every output is the first sample's).
        """
        basis = torch.eye(self.old, dtype=torch.float64 if self.exact else torch.float32)
        images = basis.reshape(self.old, 1, 1, self.old)  # one per old sample
        nearest = self.mode == "nearest"
        out = F.interpolate(
            images,
            size=(1, self.new),
            mode=self.mode,
            antialias=self.antialias and not nearest,
            align_corners=None if nearest else self.align_corners,
        )
        return out.reshape(self.old, self.new).T.double().contiguous()

    @property
    def label(self) -> str:
        """Short name of the method for tables."""
        corners = " align-corners" if self.align_corners else ""
        return f"{self.mode}{' antialias' if self.antialias else ''}{corners}"


@dataclass(frozen=True)
class Geometric(AxisMap):
    """Relative offsets with geometric spacing, linear between them; timm's default for bias tables.

    Both sides are 2*window - 1 offsets. Old offsets are placed 1, 1+q, 1+q+q² … apart so that they
    reach as far as the new ones, with q bisected in 1.01..1.5; beyond their reach the last value holds.
    As q is at least 1.01, shrinking reads about a centre crop, and an axis that keeps its window while the other
    changes is read at slightly smaller offsets: stock does so, and so do we.

    Source: BEiT fine-tuning (unilm, beit/run_class_finetuning.py) with linear interpolation as in
    timm.layers.pos_embed_rel.resize_rel_pos_bias_table.
    """

    LABEL = "geometric linear"

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        positions = self.positions()
        half = self.new // 2
        matrix = torch.zeros(self.new, self.old, dtype=torch.float64)
        for row, offset in enumerate(range(-half, self.new - half)):
            right = next((i for i, p in enumerate(positions) if p >= offset), self.old - 1)
            left = max(right - 1, 0)
            gap = positions[right] - positions[left]
            share = min(max((offset - positions[left]) / gap, 0.0), 1.0) if gap else 1.0
            matrix[row, left] += 1.0 - share
            matrix[row, right] += share
        return matrix

    def positions(self) -> list[float]:
        """Place the old offsets on the new axis (unit: one new cell), increasing."""
        old_half, new_half = self.old // 2, self.new // 2
        left, right, ratio = 1.01, 1.5, 1.01
        while right - left > 1e-6:
            ratio = (left + right) / 2.0
            reach = (1.0 - ratio**old_half) / (1.0 - ratio)
            left, right = (left, ratio) if reach > new_half else (ratio, right)
        side = [(1.0 - ratio**n) / (1.0 - ratio) for n in range(1, old_half + 1)]
        return [-p for p in reversed(side)] + [0.0, *side]


@dataclass(frozen=True)
class MirroredOffset(AxisMap):
    """A table over |offset| = 0..n-1, mirrored to an even function, interpolated corner to corner.

    Offset 0 and the last offset keep their values exactly; half-pixel sampling would move both.
    Without `antialias` it is torch's interpolation with align_corners. Torch has no corner-aligned antialias; with it
    the kernels are torch's antialias kernels, whose cubic (a = -0.5) reads a smooth table better when growing, too.
    """

    LABEL = "{mode} over mirrored offsets"

    mode: str = "bicubic"
    antialias: bool = True

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        old, new = self.old, self.new
        if old == 1 or new == 1:  # only offset 0 is known, or only it is wanted
            matrix = torch.zeros(new, old, dtype=torch.float64)
            matrix[:, 0] = 1.0
            return matrix
        mirrored_old, mirrored_new = 2 * old - 1, 2 * new - 1
        spacing = (mirrored_old - 1) / (mirrored_new - 1)  # unit: one old cell
        positions = torch.arange(mirrored_new, dtype=torch.float64) * spacing
        full = sample_matrix(positions, mirrored_old, spacing=spacing, mode=self.mode, antialias=self.antialias)
        half = full[new - 1 :]  # offsets 0..new-1 of the even function
        folded = half[:, old - 1 :].clone()
        folded[:, 1:] += half[:, : old - 1].flip(1)
        for row, column in ((0, 0), (new - 1, old - 1)):  # pinned: exact, not to rounding
            folded[row] = 0.0
            folded[row, column] = 1.0
        return folded


@dataclass(frozen=True)
class Adjoint(AxisMap):
    """The map for weights that read a grid, so that they read the resized grid the same way.

    With w over the old grid and U the interpolation old → new, a growing axis takes w' = pinv(U)ᵀ w: then
    ⟨w', U x⟩ = ⟨w, x⟩ for every grid x. A shrinking axis takes w' = Eᵀ w, E the interpolation new → old: a small
    grid is read as w reads it enlarged. So shrinking undoes growing exactly (E is that U), and a constant grid
    gives the same sum either way; with pinv(U)ᵀ a shrinking axis would keep neither.

    Source: FlexiViT, arXiv 2212.08013, section 3.4 (pseudo-inverse resize).
    """

    LABEL = "{mode} adjoint"

    mode: str = "bicubic"
    antialias: bool = True

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        if self.new == self.old:
            return torch.eye(self.old, dtype=torch.float64)
        if self.new > self.old:
            grow = Interpolate(self.old, self.new, self.mode, self.antialias, exact=True)
            return torch.linalg.pinv(grow.build()).T.contiguous()
        return Interpolate(self.new, self.old, self.mode, self.antialias, exact=True).build().T.contiguous()


@dataclass(frozen=True)
class PooledReader(AxisMap):
    """The map for weights that read a grid, so that they read any grid through an adaptive average pool to the old one.

    Equal to keeping the weights and putting `torch.nn.AdaptiveAvgPool2d(old)` before them.

    Source: the bins of torch.nn.AdaptiveAvgPool2d, from floor(i * new / old) to ceil((i + 1) * new / old).
    """

    LABEL = "as through an adaptive average pool"

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        matrix = torch.zeros(self.new, self.old, dtype=torch.float64)
        for i in range(self.old):
            start, end = i * self.new // self.old, -(-(i + 1) * self.new // self.old)
            matrix[start:end, i] = 1.0 / (end - start)
        return matrix


@dataclass(frozen=True)
class PatchKernel(AxisMap):
    """Pseudo-inverse resize of a patch kernel axis, growing or shrinking, as stock timm does it.

    Source: FlexiViT, arXiv 2212.08013, section 3.4; timm.layers.resample_patch_embed.
    """

    LABEL = "pseudo-inverse {mode}"

    mode: str = "bicubic"
    antialias: bool = True

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        resize = Interpolate(self.old, self.new, self.mode, self.antialias)  # in float32, as stock
        return torch.linalg.pinv(resize.build()).T.contiguous()


@dataclass(frozen=True)
class Magnitude(AxisMap):
    """The map of squares that bounds another map: its absolute entries, each row times its own sum."""

    LABEL = "non-negative"

    of: AxisMap

    @property
    def is_identity(self) -> bool:
        """Whether the bounded map keeps its coordinates."""
        return self.of.is_identity

    @property
    def source(self) -> Source:
        """The old side's coordinates as plain values, for `rebase`."""
        return self.of.source

    def rebase(self, source: Source) -> AxisMap:
        """Return the bound of the rebased map."""
        of = self.of.rebase(source)
        return Magnitude(of.old, of.new, of)

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        entries = self.of.matrix().abs()
        return entries * entries.sum(1, keepdim=True)
