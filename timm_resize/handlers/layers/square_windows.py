"""Windows of one side, as stock's blocks have them where they know no other. No module is registered here."""

from __future__ import annotations

from timm_resize.core.context import Context
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size


def square_side(window: Size, ctx: Context) -> int:
    """Return the side of a window (h, w) that was asked for; raise ResizeError when it is not square."""
    if window[0] != window[1]:
        raise ResizeError(
            f"{type(ctx.root).__name__}: window_size={window} is not square, as stock's blocks need it. "
            f"Use window_size={min(window)}."
        )
    return window[0]


def scaled_side(side: int, old: Size, new: Size) -> int:
    """Scale a side like the axis that grows less from `old` to `new`, rounded, at least 1.

    Example:
        >>> scaled_side(7, (224, 224), (384, 512))
        12
    """
    return max(round(side * min(n / o for n, o in zip(new, old, strict=True))), 1)
