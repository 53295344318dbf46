"""Image sizes, grids and windows as plain (h, w) tuples: parsing and rounding."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from timm_resize.errors import InvalidSizeError

Size = tuple[int, int]
"""Height and width, in that order, in pixels or in grid cells."""


def _side(value: Any) -> int:
    """Return `value` as an int, or raise TypeError; bools, floats and strings are not sides."""
    if isinstance(value, bool) or type(value).__name__ == "bool_" or str(getattr(value, "dtype", "")) == "torch.bool":
        raise TypeError
    return operator.index(value)


LARGEST = 1_000_000
"""Pixels of a side beyond which a size is a mistake: a million by a million is more than any address space takes."""


def parse_size(value: Any, name: str = "img_size", owner: str = "timm_resize") -> Size:
    """Read an int or an (H, W) pair as a size.

    Args:
        value: A positive integer, or a sequence of two; NumPy and PyTorch integers count.
        name: Argument name for the error.
        owner: Model name for the error.

    Returns:
        (height, width).

    Raises:
        InvalidSizeError: The value is not one positive integer or two.

    Example:
        >>> parse_size(224), parse_size((192, 256))
        ((224, 224), (192, 256))
    """
    wanted = f"Use {name}=224 for a square, or {name}=(192, 256) for height and width."
    is_pair = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not is_pair and getattr(value, "ndim", 0) == 1:  # NumPy or PyTorch vector
        value, is_pair = list(value), True
    sides = list(value) if is_pair else [value, value]
    if len(sides) != 2:
        raise InvalidSizeError(f"{owner}: {name}={value!r} has {len(sides)} numbers, not (height, width). {wanted}")
    try:
        height, width = _side(sides[0]), _side(sides[1])
    except (TypeError, ValueError, RuntimeError):
        kind = type(next((s for s in sides if not _is_side(s)), value)).__name__
        raise InvalidSizeError(f"{owner}: {name}={value!r} is a {kind}, not whole pixels. {wanted}") from None
    if height < 1 or width < 1:
        raise InvalidSizeError(f"{owner}: {name}={value!r} has a side below 1. {wanted}")
    if height > LARGEST or width > LARGEST:
        raise InvalidSizeError(f"{owner}: {name}={value!r} has a side above {LARGEST}. {wanted}")
    return height, width


def _is_side(value: Any) -> bool:
    try:
        _side(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def stage_sizes(value: Any, stages: int, name: str = "window_size", owner: str = "timm_resize") -> tuple[Size, ...]:
    """Expand an int, one (h, w) pair, or one of either per stage to a pair per stage.

    timm reads a flat sequence of two ints as one (h, w) for all stages; so do we.

    Raises:
        InvalidSizeError: Wrong count, or something that is not a size.

    Example:
        >>> stage_sizes((8, 4), 2), stage_sizes([7, 7, 14], 3)
        (((8, 4), (8, 4)), ((7, 7), (7, 7), (14, 14)))
    """
    if getattr(value, "ndim", 0) == 1:  # NumPy or PyTorch vector
        value = list(value)
    one_for_all = not isinstance(value, Sequence) or (len(value) == 2 and all(_is_side(v) for v in value))
    if isinstance(value, (str, bytes)) or one_for_all:
        return (parse_size(value, name, owner),) * stages
    if len(value) != stages:
        raise InvalidSizeError(
            f"{owner}: {name}={value!r} has {len(value)} entries for {stages} stages. "
            f"Use one int, one (h, w), or {stages} of them."
        )
    return tuple(parse_size(v, name, owner) for v in value)


def floor_div(size: Size, by: int | Size) -> Size:
    """Divide both sides, rounding down (a convolution without padding)."""
    by_h, by_w = (by, by) if isinstance(by, int) else by
    return size[0] // by_h, size[1] // by_w


def ceil_div(size: Size, by: int | Size) -> Size:
    """Divide both sides, rounding up (a strided convolution with 'same' padding).

    Example:
        >>> floor_div((230, 224), 16), ceil_div((230, 224), 16)
        ((14, 14), (15, 14))
    """
    by_h, by_w = (by, by) if isinstance(by, int) else by
    return -(-size[0] // by_h), -(-size[1] // by_w)


def text(size: Size) -> str:
    """Write a size as 'HxW'."""
    return f"{size[0]}x{size[1]}"


def short(size: Size) -> str:
    """Write a size as callers give it: one number for a square, else the pair."""
    return str(size[0] if size[0] == size[1] else size)


def divisible(size: Size, by: int | Size) -> bool:
    """Whether both sides are whole multiples.

    Example:
        >>> divisible((64, 48), 16), divisible((64, 48), (16, 32))
        (True, False)
    """
    by_h, by_w = (by, by) if isinstance(by, int) else by
    return size[0] % by_h == 0 and size[1] % by_w == 0


def times(size: Size, by: int | Size) -> Size:
    """Multiply both sides."""
    by_h, by_w = (by, by) if isinstance(by, int) else by
    return size[0] * by_h, size[1] * by_w


def left_over(size: Size, used: Size) -> Size:
    """Return the rows and columns of `size` beyond those `used`."""
    return size[0] - used[0], size[1] - used[1]
