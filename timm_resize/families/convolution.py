"""Sizes of feature maps behind convolutions and pools, by their own arithmetic. No module is registered here."""

from __future__ import annotations

from typing import Any

from torch import nn

from timm_resize.geometry import Size


def map_size(layer: nn.Module | None, size: Size) -> Size:
    """Return the (h, w) that a convolution or pooling layer makes of a map of `size`; None changes nothing.

    Below one kernel the result is 0 or less, where the layer itself would raise.

    Source: the shape formula of torch.nn.Conv2d.
    """
    if layer is None:
        return size
    h, w = (
        (side + 2 * pad - reach * (kernel - 1) - 1) // stride + 1
        for side, pad, reach, kernel, stride in zip(
            size,
            _pair(layer.padding),
            _pair(getattr(layer, "dilation", 1)),
            _pair(layer.kernel_size),
            _pair(layer.stride),
            strict=True,
        )
    )
    return h, w


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
