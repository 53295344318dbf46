"""A resampling as a frozen value: which axes of a tensor hold a grid, and one map per grid axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from timm_resize.resample.axis import AxisMap, Magnitude


@dataclass(frozen=True)
class Resample:
    """A linear map on any tensor with the same axis layout: a weight, its moments, its EMA twin.

    Attributes:
        axes: One map per grid axis, in the tensor's (row-major) order.
        dim: Tensor dimension of the first grid axis; the others follow it.
        flat: The grid is flattened into dimension `dim`.
        prefix: Leading entries of a flat dimension that are not of the grid, copied as they are.
        suffix: Trailing ones, likewise.
        then: A second resampling, applied to the result.
    """

    axes: tuple[AxisMap, ...]
    dim: int = 0
    flat: bool = False
    prefix: int = 0
    suffix: int = 0
    then: Resample | None = None

    @property
    def is_identity(self) -> bool:
        """Whether no axis changes; then the map copies every bit."""
        return all(axis.is_identity for axis in self.axes) and (self.then is None or self.then.is_identity)

    @property
    def label(self) -> str:
        """The method's name for tables, once per distinct map."""
        names = [a.label for a in self.axes] + ([self.then.label] if self.then else [])
        return " + ".join(dict.fromkeys(names))

    @property
    def source(self) -> tuple[Any, ...]:
        """The old side's coordinates, as nested tuples of plain values."""
        return (*(a.source for a in self.axes), *(self.then.source if self.then else ()))

    def rebase(self, source: Sequence[Any]) -> Resample:
        """Return the map from another old side (a `source`) to the same new side."""
        here, rest = source[: len(self.axes)], source[len(self.axes) :]
        axes = tuple(a.rebase(tuple(s)) for a, s in zip(self.axes, here, strict=True))
        return replace(self, axes=axes, then=self.then.rebase(rest) if self.then else None)

    def shape(self, old: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that a tensor of shape `old` gets; ValueError when it does not fit."""
        shape, count = list(old), len(self.axes)
        if self.flat:
            have, want = shape[self.dim] - self.prefix - self.suffix, _product(a.old for a in self.axes)
            if have != want:
                raise ValueError(f"dimension {self.dim} of {tuple(old)} holds {have} grid entries, not {want}")
            shape[self.dim] = _product(a.new for a in self.axes) + self.prefix + self.suffix
        else:
            if shape[self.dim : self.dim + count] != [a.old for a in self.axes]:
                raise ValueError(f"{tuple(old)} has no grid {[a.old for a in self.axes]} at dimension {self.dim}")
            shape[self.dim : self.dim + count] = [a.new for a in self.axes]
        return self.then.shape(shape) if self.then else tuple(shape)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the resampled tensor: a new one, contiguous, of the same dtype and device.

        Computed in float32 (float64 stays float64). Non-grid entries are copied bit for bit.
        """
        shape = self.shape(tensor.shape)
        if tensor.is_meta:
            return tensor.new_empty(shape)
        if self.is_identity:
            return tensor.detach().clone(memory_format=torch.contiguous_format)
        out = self._map(tensor.detach())
        return self.then(out) if self.then else out

    def second_moment(self, tensor: Tensor) -> Tensor:
        """Map a running mean of squares so that it stays one: non-negative, and no less than the mean squared.

        For a row a of the map, (Σ aᵢ mᵢ)² ≤ Σ|aᵢ| · Σ|aᵢ| mᵢ² (Cauchy-Schwarz), so with |a| scaled by its own sum
        an Adam step m/√v after the resize is bounded as it was before.
        """
        return self._magnitude()(tensor)

    def _magnitude(self) -> Resample:
        axes = tuple(a if a.is_identity else Magnitude(a.old, a.new, a) for a in self.axes)
        return replace(self, axes=axes, then=self.then._magnitude() if self.then else None)

    def _map(self, tensor: Tensor) -> Tensor:
        """Apply `axes` alone."""
        if all(axis.is_identity for axis in self.axes):
            return tensor
        if self.flat and (self.prefix or self.suffix):
            sizes = [self.prefix, tensor.shape[self.dim] - self.prefix - self.suffix, self.suffix]
            head, grid, tail = tensor.split(sizes, self.dim)
            return torch.cat([head, self._grid(grid), tail], self.dim)
        return self._grid(tensor)

    def _grid(self, tensor: Tensor) -> Tensor:
        shape, dim = list(tensor.shape), self.dim
        spatial = 1 if self.flat else len(self.axes)
        lead, trail = _product(shape[:dim]), _product(shape[dim + spatial :])
        work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        out = tensor.to(work).reshape(lead, *(a.old for a in self.axes), trail)
        for i, axis in enumerate(self.axes):
            matrix = axis.matrix().to(device=tensor.device, dtype=work)
            before, after = _product(out.shape[: i + 1]), _product(out.shape[i + 2 :])
            done = [*out.shape[: i + 1], axis.new, *out.shape[i + 2 :]]
            out = (matrix @ out.reshape(before, axis.old, after)).reshape(done)  # (before, new, after)
        new_spatial = [_product(a.new for a in self.axes)] if self.flat else [a.new for a in self.axes]
        return out.reshape(*shape[:dim], *new_spatial, *shape[dim + spatial :]).to(tensor.dtype)


def _product(values: Any) -> int:
    out = 1
    for value in values:
        out *= int(value)
    return out
