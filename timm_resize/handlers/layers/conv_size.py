"""Sizes of feature maps behind convolutions and pools, by their own arithmetic. No module is registered here."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from timm_resize.geometry import Size, ceil_div

SPATIAL = (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)


def map_size(layer: nn.Module | None, size: Size) -> Size:
    """Return the (h, w) that a layer makes of a map of `size`; None changes nothing.

    The layer is a convolution or a pool, or a chain of modules, which forward runs in the order that they are
    registered. Below one kernel the result is 0 or less, where the layer itself would raise.

    Source: the shape formulas of torch.nn.Conv2d and torch.nn.AvgPool2d; "same" padding as in TensorFlow.
    """
    if layer is None:
        return size
    if not isinstance(layer, SPATIAL):
        for _, child in parts(layer):
            size = map_size(child, size)
        return size
    if isinstance(layer, _SAME):
        return ceil_div(size, _pair(layer.stride))
    sides = zip(
        size,
        _pair(layer.padding),
        _pair(getattr(layer, "dilation", 1)),
        _pair(layer.kernel_size),
        _pair(layer.stride),
        strict=True,
    )
    h, w = (_side(*side, bool(getattr(layer, "ceil_mode", False))) for side in sides)
    return h, w


def parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module's children by name, in order, also one that is there twice, as `named_children` does not."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


_SAME = (Conv2dSame, AvgPool2dSame, MaxPool2dSame)


def _side(side: int, padding: int, dilation: int, kernel: int, stride: int, ceil: bool) -> int:
    last = side + 2 * padding - dilation * (kernel - 1) - 1  # start of the last window that fits, pads included
    count = last // stride + 1
    if ceil and last % stride and count * stride < side + padding:  # one more, if it starts before the right pad
        count += 1
    return count


def _pair(value: int | str | Sequence[int]) -> Size:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
