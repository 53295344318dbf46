"""A layer that somebody put into an `nn.Sequential`, to add a dropout or to wrap it, counts as it did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import timm_resize
from tests.helpers.examples import EXAMPLES
from tests.helpers.oracle import image, redraw_, stock

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


def test_a_stage_in_two_places_halves_the_map_twice():
    """One module under two names is run twice, so what comes behind it is for the smaller map."""
    model, plain = (stock("coatnet_nano_rw_224", **EXAMPLES["coatnet_nano_rw_224"]) for _ in range(2))
    plain.load_state_dict(redraw_(model).state_dict())
    model.stages[0] = model.stages[1]
    plain.stages[0].load_state_dict(plain.stages[1].state_dict())
    for each in (model, plain):
        timm_resize.resize_(each, (96, 160))
    with torch.no_grad():
        assert torch.equal(model(image((96, 160))), plain(image((96, 160))))
