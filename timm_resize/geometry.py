"""Image sizes, grids and windows as plain (h, w) tuples: parsing and rounding."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

from timm_resize.errors import InvalidSizeError

Size = tuple[int, int]
"""Height and width, in that order, in pixels or in grid cells."""

SizeLike = int | Sequence[int]
"""A size as callers give it: one side of a square, or (H, W)."""


def _side(value: object) -> int:
    """Return `value` as an int, or raise TypeError; bools, floats and strings are not sides."""
    truth = (
        isinstance(value, bool) or type(value).__name__ == "bool_" or str(getattr(value, "dtype", "")) == "torch.bool"
    )
    if truth or not isinstance(value, SupportsIndex):
        raise TypeError
    return operator.index(value)


LARGEST = 1_000_000
"""Pixels of a side beyond which a size is a mistake: a million by a million is more than any address space takes."""


def parse_size(value: object, name: str = "img_size", owner: str = "timm_resize") -> Size:
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
    value = _listed(value)
    sides = list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value, value]
    odd = [side for side in sides if not _is_side(side)]
    if len(sides) != 2:
        reason = f"has {len(sides)} numbers, not (height, width)"
    elif odd:
        reason = f"is a {type(odd[0]).__name__}, not whole pixels"
    elif min(map(_side, sides)) < 1:
        reason = "has a side below 1"
    elif max(map(_side, sides)) > LARGEST:
        reason = f"has a side above {LARGEST}"
    else:
        return _side(sides[0]), _side(sides[1])
    raise InvalidSizeError(f"{owner}: {name}={value!r} {reason}. {wanted}", model=owner, argument=name, value=value)


def _listed(value: object) -> object:
    """Return a vector of NumPy or PyTorch as a list, anything else as it is."""
    return list(value) if isinstance(value, Iterable) and getattr(value, "ndim", 0) == 1 else value


def _is_side(value: object) -> bool:
    try:
        _side(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def stage_sizes(value: object, stages: int, name: str = "window_size", owner: str = "timm_resize") -> tuple[Size, ...]:
    """Expand an int, one (h, w) pair, or one of either per stage to a pair per stage.

    timm reads a flat sequence of two ints as one (h, w) for all stages; so do we.

    Raises:
        InvalidSizeError: Wrong count, or something that is not a size.

    Example:
        >>> stage_sizes((8, 4), 2), stage_sizes([7, 7, 14], 3)
        (((8, 4), (8, 4)), ((7, 7), (7, 7), (14, 14)))
    """
    value = _listed(value)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return (parse_size(value, name, owner),) * stages
    if len(value) == 2 and all(map(_is_side, value)):
        return (parse_size(value, name, owner),) * stages
    if len(value) != stages:
        raise InvalidSizeError(
            f"{owner}: {name}={value!r} has {len(value)} entries for {stages} stages. "
            f"Use one int, one (h, w), or {stages} of them.",
            model=owner,
            argument=name,
            value=value,
        )
    return tuple(parse_size(v, name, owner) for v in value)


def _both(by: int | Size) -> Size:
    return (by, by) if isinstance(by, int) else by


def floor_div(size: Size, by: int | Size) -> Size:
    """Divide both sides, rounding down (a convolution without padding)."""
    h, w = _both(by)
    return size[0] // h, size[1] // w


def ceil_div(size: Size, by: int | Size) -> Size:
    """Divide both sides, rounding up (a strided convolution with 'same' padding).

    Example:
        >>> floor_div((230, 224), 16), ceil_div((230, 224), 16)
        ((14, 14), (15, 14))
    """
    h, w = _both(by)
    return -(-size[0] // h), -(-size[1] // w)


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
    h, w = _both(by)
    return size[0] % h == 0 and size[1] % w == 0


def times(size: Size, by: int | Size) -> Size:
    """Multiply both sides."""
    h, w = _both(by)
    return size[0] * h, size[1] * w


def left_over(size: Size, used: Size) -> Size:
    """Return the rows and columns of `size` beyond those `used`."""
    return size[0] - used[0], size[1] - used[1]
