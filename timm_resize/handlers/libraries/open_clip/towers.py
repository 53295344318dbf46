"""What open_clip's image towers share: where they record their size. No module is registered here."""

from __future__ import annotations

from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.geometry import Size, parse_size


def image_size(tower: nn.Module) -> Size:
    """Return the size (H, W) that a tower records, as a pair or as the side of a square."""
    return parse_size(tower.image_size, "image_size", type(tower).__name__)


def record_size(tower: nn.Module, ctx: Context) -> Changes:
    """Set the size where the tower has it, and where open_clip makes its transforms from.

    It stays the side of a square where it is one.
    """
    (h, w), single = ctx.new_size, isinstance(tower.image_size, int)
    size = h if single and h == w else (h, w)
    yield from ctx.attribute(tower, image_size=size)
    preprocess = getattr(tower, "preprocess_cfg", None)  # set by open_clip's factory alone
    if preprocess:
        yield from ctx.attribute(tower, preprocess_cfg={**preprocess, "size": size})
