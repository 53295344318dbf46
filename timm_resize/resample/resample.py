"""A resampling as a frozen value: which axes of a tensor hold a grid, and one map per grid axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from timm_resize.resample import serial
from timm_resize.resample.axis import AxisMap, Magnitude

COLUMNS = 256
"""Numbers of each cell that are mapped at a time: two to five times faster than all of them, or few."""


@dataclass(frozen=True)
class Resample:
    """A linear map on any tensor with the same axis layout: a weight, its moments, its EMA twin.

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

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the resampled tensor: a new one, contiguous, of the same dtype and device.

        Computed in float64: float32 products may run in TF32 or bfloat16, by the user's matmul precision or under
        autocast. Non-grid entries are copied bit for bit.
        """
        shape = self.shape(tensor.shape)
        if tensor.is_meta:
            return tensor.new_empty(shape)
        if self.is_identity:
            return tensor.detach().clone(memory_format=torch.contiguous_format)
        if self._is_wide(shape):
            return self._mapped_by_columns([tensor.detach()], shape)[0]
        device = tensor.device if tensor.device.type in _HAVE_FLOAT64 else torch.device("cpu")
        out = self._apply(serial.converted(tensor.detach().to(device), torch.float64))
        return serial.converted(out, tensor.dtype).to(tensor.device)

    def _is_wide(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of the new `shape` is one grid of two axes with many numbers in each cell, or many grids."""
        if type(self) is not Resample or len(self.axes) != 2 or self.then or (self.before, self.after) != (1, 1):
            return False
        lead, rest = math.prod(shape[: self.dim]), math.prod(shape[self.dim + (1 if self.flat else 2) :])
        return min(lead, rest) == 1 and max(lead, rest) >= 4

    def each(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each of several tensors of one shape, dtype and device resampled; small ones are mapped together."""
        shape = self.shape(tensors[0].shape)
        if tensors[0].is_meta or self.is_identity or not self._is_wide(shape):
            return [self(tensor) for tensor in tensors]
        return self._mapped_by_columns([tensor.detach() for tensor in tensors], shape)

    def _mapped_by_columns(self, tensors: Sequence[Tensor], shape: Sequence[int]) -> list[Tensor]:
        """Map wide tensors some columns at a time, so that what is in float64 stays in the cache."""
        rows, columns = self.axes
        device = tensors[0].device if tensors[0].device.type in _HAVE_FLOAT64 else torch.device("cpu")
        row_matrix, column_matrix = rows.matrix().to(device), columns.matrix().to(device)
        width = math.prod(shape[: self.dim]) * math.prod(shape[self.dim + (1 if self.flat else 2) :])
        work = width * rows.new * columns.old * (rows.old + columns.new)
        few = work <= serial.LARGE and device.type == "cpu"
        multiply, step = (serial.product, serial.columns(rows.new * columns.new)) if few else (torch.mm, COLUMNS)
        out, parts = [], list[tuple[Tensor, Tensor]]()
        for tensor in tensors:
            out.append(tensor.new_empty(shape, device=device))
            old, grid = self._cells(tensor.to(device), out[-1], width)
            parts += zip(old.split(step, 1), grid.split(step, 2), strict=True)
        together = max(step // width, 1)
        for start in range(0, len(parts), together):
            olds, news = zip(*parts[start : start + together], strict=True)
            part = (torch.cat(olds, 1) if len(olds) > 1 else olds[0]).to(torch.float64)
            count = part.shape[1]
            part = multiply(row_matrix, part.reshape(rows.old, columns.old * count))
            part = part.view(rows.new, columns.old, count).transpose(0, 1).reshape(columns.old, rows.new * count)
            part = multiply(column_matrix, part).view(columns.new, rows.new, count).transpose(0, 1)
            for new, done in zip(news, part.split([n.shape[2] for n in news], 2), strict=True):
                new.copy_(done)
        return [result.to(tensor.device) for tensor, result in zip(tensors, out, strict=True)]

    def _cells(self, tensor: Tensor, out: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Copy what is not of the grid to `out`; return views of the cells, (old, width) and (rows, columns, width)."""
        first = math.prod(tensor.shape[: self.dim]) == 1  # the grid comes first, then what is in its cells
        old, new = (t.reshape(-1, width) if first else t.reshape(width, -1).T for t in (tensor, out))
        end = len(new) - self.suffix
        if self.prefix or self.suffix:
            new[: self.prefix] = old[: self.prefix]
            new[end:] = old[len(old) - self.suffix :]
        grid = new[self.prefix : end].unflatten(0, [axis.new for axis in self.axes])
        return old[self.prefix : len(old) - self.suffix], grid

    def differentiable(self, tensor: Tensor) -> Tensor:
        """As a call, but part of autograd's graph: gradients go through the map to `tensor`."""
        self.shape(tensor.shape)
        if self.is_identity:
            return tensor
        device = tensor.device if tensor.device.type in _HAVE_FLOAT64 else torch.device("cpu")
        return self._apply(tensor.to(device, torch.float64)).to(tensor.device, tensor.dtype)

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
            if self.flat and (self.prefix or self.suffix):
                sizes = [self.prefix, tensor.shape[self.dim] - self.prefix - self.suffix, self.suffix]
                head, grid, tail = tensor.split(sizes, self.dim)
                parts = [head, self._grid(grid), tail]
                tensor = torch.cat(parts, self.dim) if _in_graph(tensor) else serial.joined(parts, self.dim)
            else:
                tensor = self._grid(tensor)
        return self.then._apply(tensor) if self.then else tensor

    def _grid(self, tensor: Tensor) -> Tensor:
        """Map a float64 tensor whose grid has no prefix or suffix by `axes`, one matrix product each."""
        shape, dim = list(tensor.shape), self.dim
        lead, rest = shape[:dim], shape[dim + (1 if self.flat else len(self.axes)) :]
        if self.flat:
            lead, rest = [*lead, self.before], [self.after, *rest]
        sides = [axis.old for axis in self.axes]
        for i, axis in enumerate(self.axes):
            before, after = math.prod(lead + sides[:i]), math.prod(sides[i + 1 :] + rest)
            matrix, tensor = axis.matrix().to(tensor.device), tensor.reshape(before, axis.old, after)
            tensor = matrix @ tensor if _in_graph(tensor) else serial.middle_product(matrix, tensor)
            sides[i] = axis.new
        flat = [self.before * math.prod(sides) * self.after]
        return tensor.reshape(lead[:-1] + flat + rest[1:] if self.flat else lead + sides + rest)


def _in_graph(tensor: Tensor) -> bool:
    """Whether autograd follows: then no operation may write to an output of its own choice."""
    return tensor.requires_grad and torch.is_grad_enabled()


_HAVE_FLOAT64 = ("cpu", "cuda")
"""Devices that certainly compute in float64; for others the work is done on the CPU."""
