"""A layer that somebody put into an `nn.Sequential`, to add a dropout or to wrap it, counts as it did."""

from __future__ import annotations

import pytest
from torch import nn

import timm_resize
from tests.helpers.examples import EXAMPLES
from tests.helpers.oracle import stock

LAYERS = [
    ("swin_tiny_patch4_window7_224", "layers.0.downsample"),
    ("swin_tiny_patch4_window7_224", "layers.1.downsample"),
    ("efficientformer_l1", "stages.1.downsample"),
    ("gcvit_xxtiny", "stages.0.global_block.blocks.pool1"),
    ("volo_d1_224", "network.1"),
]


def plan(model, path=""):
    """What a resize to 160 pixels changes, by the names of the model without the container."""
    changes = timm_resize.plan_resize(model, 160)
    return {c.key.replace(f"{path}.0", path) if path else c.key: c.new for c in changes if c.name != "input_guard"}


@pytest.mark.parametrize(("name", "path"), LAYERS)
def test_layers_in_a_sequential(name, path):
    """Tensors, windows and grids are planned as without it."""
    model = stock(name, device="meta", **EXAMPLES[name])
    want = plan(model)
    parent, _, child = path.rpartition(".")
    model.get_submodule(parent)._modules[child] = nn.Sequential(model.get_submodule(path), nn.Dropout(0.1))
    assert len(want) > 1
    assert plan(model, path) == want
