"""A resampling as a frozen value: which axes of a tensor hold a grid, and one map per grid axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from timm_resize.resample.axis import AxisMap, Magnitude, Source

PIECE = 100_000
"""Numbers to map at a time: in float64 they stay in the cache, which maps a position embedding twice as fast."""


@dataclass(frozen=True)
class Resample:
    """A linear map on any tensor with the same axis layout: a weight, its moments, its averaged copy.

    A tensor is mapped by itself, out of new memory, in pieces that follow from its shape alone. So its bits do not
    depend on which tensors are mapped with it, on its strides or place in memory, or on whether autograd follows. The
    sums within a piece are the BLAS library's, in float64: another library, processor or number of threads may round
    the last bit of a float64 result otherwise.

    Attributes:
        axes: One map per grid axis, in the tensor's (row-major) order.
        dim: Tensor dimension of the first grid axis; the others follow it.
        flat: The grid is flattened into dimension `dim`.
        prefix: Leading entries of a flat dimension that are not of the grid, copied as they are.
        suffix: Trailing ones, likewise.
        before: Entries of a flat dimension that each hold a grid, one grid after the other (channels first).
        after: Entries that every cell of the grid in a flat dimension holds (channels last).
        then: A second resampling, applied to the result.
    """

    axes: tuple[AxisMap, ...]
    dim: int = 0
    flat: bool = False
    prefix: int = 0
    suffix: int = 0
    before: int = 1
    after: int = 1
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
    def source(self) -> tuple[Source, ...]:
        """The old side's coordinates, one tuple per axis, those of `then` last."""
        return (*(a.source for a in self.axes), *(self.then.source if self.then else ()))

    def rebase(self, source: Sequence[Source]) -> Resample:
        """Return the map from another old side (a `source`) to the same new side."""
        here, rest = source[: len(self.axes)], source[len(self.axes) :]
        axes = tuple(a.rebase(tuple(s)) for a, s in zip(self.axes, here, strict=True))
        return replace(self, axes=axes, then=self.then.rebase(rest) if self.then else None)

    def shape(self, old: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that a tensor of shape `old` gets; ValueError when it does not fit."""
        shape, count = list(old), len(self.axes)
        if len(shape) < self.dim + (1 if self.flat else count):
            raise ValueError(f"{tuple(old)} has no grid at dimension {self.dim}")
        if self.flat:
            each = self.before * self.after
            have, want = shape[self.dim] - self.prefix - self.suffix, math.prod(a.old for a in self.axes) * each
            if have != want:
                raise ValueError(f"dimension {self.dim} of {tuple(old)} holds {have} grid entries, not {want}")
            shape[self.dim] = math.prod(a.new for a in self.axes) * each + self.prefix + self.suffix
        else:
            if shape[self.dim : self.dim + count] != [a.old for a in self.axes]:
                raise ValueError(f"{tuple(old)} has no grid {[a.old for a in self.axes]} at dimension {self.dim}")
            shape[self.dim : self.dim + count] = [a.new for a in self.axes]
        return self.then.shape(shape) if self.then else tuple(shape)

    @torch.no_grad()
    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the resampled tensor: a new one, contiguous, of the same dtype and device.

        Computed in float64: float32 products may run in TF32 or bfloat16, by the user's matmul precision or under
        autocast. Non-grid entries are copied bit for bit, and so is everything by an identity.
        """
        shape = self.shape(tensor.shape)
        if self.is_identity:
            return tensor.detach().clone(memory_format=torch.contiguous_format)
        out = tensor.new_empty(shape)
        if not tensor.is_meta:
            dim, step = self._cut(tensor.shape, shape)
            for old, new in zip(tensor.split(step, dim), out.split(step, dim), strict=True):
                new.copy_(self._float64(old))
        return out

    def differentiable(self, tensor: Tensor) -> Tensor:
        """As a call, bit for bit, but part of autograd's graph; an identity returns `tensor` itself."""
        shape = self.shape(tensor.shape)
        if self.is_identity:
            return tensor
        if tensor.is_meta:
            return tensor.new_empty(shape)
        dim, step = self._cut(tensor.shape, shape)
        parts = [self._float64(part).to(tensor.device, tensor.dtype) for part in tensor.split(step, dim)]
        return torch.cat(parts, dim)

    def _float64(self, tensor: Tensor) -> Tensor:
        """Map a piece of a tensor, from a copy whose place and strides are always the same."""
        device = tensor.device if tensor.device.type in _HAVE_FLOAT64 else torch.device("cpu")
        return self._apply(tensor.to(device, torch.float64, copy=True, memory_format=torch.contiguous_format))

    def _cut(self, old: Sequence[int], new: Sequence[int]) -> tuple[int, int]:
        """Return the longest dimension that holds no grid, and how many of its entries make a piece."""
        grids = self._grid_dims()
        free = [dim for dim in range(len(old)) if dim not in grids]
        if not free:
            return 0, max(old[0], new[0])  # a token-to-token matrix or a bias per token: whole
        dim = max(free, key=old.__getitem__)
        entry = max(math.prod(old), math.prod(new)) // max(old[dim], 1)
        return dim, max(PIECE // max(entry, 1), 1)

    def _grid_dims(self) -> set[int]:
        """Return the dimensions that hold a grid, here or for `then`."""
        here = range(self.dim, self.dim + (1 if self.flat else len(self.axes)))
        return {*here, *(self.then._grid_dims() if self.then else ())}

    @property
    def every_axis(self) -> tuple[AxisMap, ...]:
        """The maps of all axes, those of `then` last."""
        return (*self.axes, *(self.then.every_axis if self.then else ()))

    def workspace(self, old: Sequence[int]) -> int:
        """Return about how many bytes a call on a tensor of shape `old` takes beside its result and the matrices.

        A piece is there five times, in float64: as it came, as an axis gets it, as columns, as the product, as a copy.
        """
        dim, step = self._cut(old, self.shape(old))
        numbers = largest = float(math.prod(old))
        for axis in reversed(self.every_axis):
            numbers *= axis.new / axis.old
            largest = max(largest, numbers)
        return int(40 * largest * min(step / max(old[dim], 1), 1))

    def second_moment(self, tensor: Tensor) -> Tensor:
        """Map a running mean of squares so that it stays one: non-negative, and no less than the mean squared.

        For a row a of the map, (Σ aᵢ mᵢ)² ≤ Σ|aᵢ| · Σ|aᵢ| mᵢ² (Cauchy-Schwarz), so with |a| scaled by its own sum
        an Adam step m/√v after the resize is bounded as it was before.
        """
        return self._magnitude()(tensor)

    def _magnitude(self) -> Resample:
        axes = tuple(Magnitude(a.old, a.new, a) for a in self.axes)
        return replace(self, axes=axes, then=self.then._magnitude() if self.then else None)

    def _apply(self, tensor: Tensor) -> Tensor:
        """Map a float64 tensor by `axes`, then by `then`."""
        if not all(axis.is_identity for axis in self.axes):
            sizes = [self.prefix, tensor.shape[self.dim] - self.prefix - self.suffix, self.suffix]
            head, grid, tail = tensor.split(sizes, self.dim)
            grid = self._grid(grid)
            tensor = torch.cat([head, grid, tail], self.dim) if self.prefix or self.suffix else grid
        return self.then._apply(tensor) if self.then else tensor

    def _grid(self, tensor: Tensor) -> Tensor:
        """Map a float64 tensor whose grid has no prefix or suffix by `axes`, one matrix product each."""
        shape, dim = list(tensor.shape), self.dim
        lead, rest = shape[:dim], shape[dim + (1 if self.flat else len(self.axes)) :]
        if self.flat:
            lead, rest = [*lead, self.before], [self.after, *rest]
        sides = [axis.old for axis in self.axes]
        for i, axis in reversed(list(enumerate(self.axes))):  # so the last product is laid out as the result
            before, after = math.prod(lead + sides[:i]), math.prod(sides[i + 1 :] + rest)
            columns = tensor.reshape(before, axis.old, after).transpose(0, 1).reshape(axis.old, before * after)
            product = axis.matrix().to(tensor.device) @ columns
            tensor = product.view(axis.new, before, after).transpose(0, 1)
            sides[i] = axis.new
        flat = [self.before * math.prod(sides) * self.after]
        return tensor.reshape(lead[:-1] + flat + rest[1:] if self.flat else lead + sides + rest)


_HAVE_FLOAT64 = ("cpu", "cuda")
"""Devices that certainly compute in float64; for others the work is done on the CPU."""
