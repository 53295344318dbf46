"""Sizes behind convolutions and pools against torch's own, run without values."""

from __future__ import annotations

import pytest
import torch
from timm.layers import AvgPool2dSame, Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from timm_resize.handlers.layers.conv_size import map_size

LAYERS = [
    nn.Conv2d(3, 3, 7, stride=2, padding=3),
    nn.Conv2d(3, 3, 3, stride=(2, 1), dilation=2),
    nn.Conv2d(3, 3, (3, 5), padding=(0, 2)),
    nn.MaxPool2d(3, stride=2, padding=1),
    nn.AvgPool2d(3, stride=2, ceil_mode=True),
    nn.MaxPool2d(2, ceil_mode=True),
    Conv2dSame(3, 3, 3, stride=2),
    AvgPool2dSame(2, stride=2),
    MaxPool2dSame(3, stride=2),
    nn.Sequential(
        nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.Sequential(nn.ReLU(), nn.AvgPool2d(2))
    ),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_sizes_are_torchs(layer):
    """Every size from 7 to 24 on one axis, beside another on the other; a chain is followed layer by layer."""
    layer = layer.to("meta").eval()
    for side in range(7, 25):
        size = (side, 31 - side)
        with torch.no_grad():
            want = tuple(layer(torch.empty(1, 3, *size, device="meta")).shape[-2:])
        assert map_size(layer, size) == want, size


def test_no_layer_changes_nothing():
    """None, and layers without a window, keep the size."""
    assert map_size(None, (5, 6)) == (5, 6)
    assert map_size(nn.Sequential(nn.ReLU(), nn.Identity()), (5, 6)) == (5, 6)
