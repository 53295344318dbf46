"""Work too small to share between threads, done in pieces that torch does not share.

Torch wakes its threads from 32768 elements on, and MKL for products of about 100 000 multiplications. Where the cores
are busy, waiting until all threads have come and gone takes milliseconds; the work itself, mostly microseconds.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

ELEMENTS = 32767
"""Elements up to which torch runs an elementwise operation in the calling thread."""

PRODUCTS = 90_000
"""Multiplications up to which a matrix product stays in the calling thread."""

LAZY = 1 << 18
"""Bytes from which zeros are pages that the kernel gives when they are touched."""

LARGE = 4_000_000
"""Multiplications of a resampling from which sharing its products is worth the waiting."""

PIECES = 512
"""Most pieces that are worth their overhead; more work than that is shared."""


def copy_(out: Tensor, source: Tensor) -> Tensor:
    """As `out.copy_(source)` for tensors of one shape; returns `out`."""
    flat = out.is_contiguous() and source.is_contiguous()
    to, of = (out.view(-1), source.view(-1)) if flat else (out, source)
    if not (step := _rows(to)):
        return out.copy_(source)
    for a, b in zip(to.split(step), of.split(step), strict=True):
        a.copy_(b)
    return out


def zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros(shape, ...)`, but large ones take time and memory only where something is written to them.

    They are pages of the kernel's that are not there until they are touched, and all one page while they are read.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type == "cpu" and size >= LAZY and hasattr(mmap, "MAP_PRIVATE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=dtype).view(*shape)
    out = torch.empty(shape, dtype=dtype, device=device)
    for part in cut(out.view(-1)):
        part.zero_()
    return out


def added(a: Tensor, b: Tensor) -> Tensor:
    """As `a + b` for tensors of one dtype, where `b` is broadcast along the first dimension."""
    out = a.new_empty(torch.broadcast_shapes(a.shape, b.shape))
    step = _rows(out) or max(len(out), 1)
    for to, part in zip(out.split(step), a.split(step), strict=True):
        torch.add(part, b, out=to)
    return out


def cut(tensor: Tensor) -> Sequence[Tensor]:
    """Return views of a tensor, cut along the first dimension, that cover it."""
    step = _rows(tensor)
    return tensor.split(step) if step else (tensor,)


def copied(tensor: Tensor) -> Tensor:
    """Return a contiguous copy."""
    return copy_(torch.empty_like(tensor, memory_format=torch.contiguous_format), tensor)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy of another dtype."""
    return copy_(tensor.new_empty(tensor.shape, dtype=dtype), tensor)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """As `torch.cat(parts, dim)`."""
    shape, at = list(parts[0].shape), 0
    shape[dim] = sum(part.shape[dim] for part in parts)
    out = parts[0].new_empty(shape)
    for part in parts:
        if part.numel():
            copy_(out.narrow(dim, at, part.shape[dim]), part)
        at += part.shape[dim]
    return out


def equal(a: Tensor, b: Tensor) -> bool:
    """As `torch.equal(a, b)`."""
    if a.shape != b.shape or not (a.is_contiguous() and b.is_contiguous()):
        return torch.equal(a, b)
    return all(map(torch.equal, cut(a.view(-1)), cut(b.view(-1))))


def middle_product(matrix: Tensor, tensor: Tensor) -> Tensor:
    """Map the middle axis: (new, old) by (before, old, after) gives (before, new, after)."""
    (new, old), (before, _, after) = matrix.shape, tensor.shape
    if after == 1:  # one large product in place of many small ones
        rows = _contiguous(tensor).view(before, old)
        step = PRODUCTS // matrix.numel()
        if not step or not _worth_cutting(tensor, before, step):
            return (rows @ matrix.T).unsqueeze(2)
        out = tensor.new_empty(before, new)
        for part, to in zip(rows.split(step), out.split(step), strict=True):
            torch.mm(part, matrix.T, out=to)
        return out.unsqueeze(2)
    if before == 1:
        return product(matrix, tensor[0]).unsqueeze(0)
    if not _threaded(tensor) or before * after * matrix.numel() > PIECES * PRODUCTS:
        return matrix @ tensor  # a batch of products is shared however small it is
    if after * matrix.numel() > PRODUCTS:
        return torch.stack([product(matrix, one) for one in tensor])
    columns = _contiguous(tensor.transpose(0, 1)).view(old, -1)
    return _contiguous(product(matrix, columns).view(new, before, after).transpose(0, 1))


def columns(rows: int) -> int:
    """Return how many columns of a matrix of so many rows torch copies in the calling thread, at least 16."""
    return max(ELEMENTS // rows, 16)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b`, in pieces of the columns of `b`."""
    step = PRODUCTS // a.numel()
    if not step or not _worth_cutting(a, b.shape[1], step):
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    for columns, to in zip(b.split(step, 1), out.split(step, 1), strict=True):
        torch.mm(a, columns, out=to)
    return out


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else copied(tensor)


def _rows(tensor: Tensor) -> int:
    """Return how many entries of the first dimension make a piece, 0 where the tensor is better left whole."""
    length = tensor.shape[0] if tensor.dim() else 0
    step = max(ELEMENTS * length // max(tensor.numel(), 1), 1)
    return step if _worth_cutting(tensor, length, step) else 0


def _worth_cutting(tensor: Tensor, length: int, step: int) -> bool:
    """Whether cutting `length` by `step` gives more than one piece, but not so many that threads would be faster."""
    return step < length <= PIECES * step and _threaded(tensor)


def _threaded(tensor: Tensor) -> bool:
    """Whether torch would share the work."""
    return tensor.device.type == "cpu" and torch.get_num_threads() > 1
