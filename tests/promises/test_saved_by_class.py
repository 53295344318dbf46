"""Every class of model, resized and saved: opened by stock timm where its constructor can, by the plugin always."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import timm_resize
from tests.helpers.examples import EXAMPLES, HEAVY, example, sweep
from tests.helpers.oracle import first, image
from tests.hub.test_save import READER
from timm_resize.core.find import current_size
from timm_resize.hub.save import save_pretrained, stock_misfit

NAMES = sorted(EXAMPLES)
LIGHT = [name for name in NAMES if name not in HEAVY]
GROUPS = [LIGHT[::2], LIGHT[1::2], pytest.param(sorted(HEAVY), marks=pytest.mark.slow)]
"""Each opened in a process of its own, which takes seconds to import torch."""

REFUSED = {
    name: f"stages.3.blocks.{block}.token_mixer.attention_biases is [8, 25], stock builds [8, 49]"
    for name, block in (("efficientformer_l1", 2), ("efficientformer_l7", 1))
}
"""Square sizes that stock's constructor cannot express: EfficientFormer's has no argument for its map of 7x7."""


def saved(name, size, folder):
    """Resize by about `size` pixels, save, and write an image and what the model makes of it."""
    model = example(name)
    height, width = current_size(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm_resize.resize_(model, timm_resize.nearest_sizes(model, (height + size[0], width + size[1]))[0])
    folder.mkdir()
    save_pretrained(model, folder)
    x = image(current_size(model))
    torch.save(x, folder / "image.pt")
    with torch.no_grad():
        return model, model(x)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_square_sizes_open_in_stock_timm(names, tmp_path):
    """In a process where importing this package fails: equal bits, equal outputs, the input size."""
    made = {}
    for name in names:
        made[name] = saved(name, (-64, -64), tmp_path / name)
        assert (stock_misfit(tmp_path / name) or "") == REFUSED.get(name, "")
    readable = [name for name in names if name not in REFUSED]
    run = subprocess.run(
        [sys.executable, "-c", READER, *(str(tmp_path / name) for name in readable)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for name in readable:
        model, output = made[name]
        seen = torch.load(tmp_path / name / "seen.pt")
        assert_same(seen["state"], model.state_dict())
        assert torch.equal(first(seen["output"]), first(output)), name
        assert seen["input_size"][1:] == current_size(model)


@pytest.mark.parametrize("name", sweep(*NAMES))
def test_non_square_sizes_open_with_the_plugin(name, tmp_path):
    """Equal bits and outputs, whatever stock's constructor can."""
    model, output = saved(name, (32, 96), tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = timm_resize.create_model(f"local-dir:{tmp_path / name}", pretrained=True, img_size=current_size(model))
    assert_same(again.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(first(again.eval()(torch.load(tmp_path / name / "image.pt"))), first(output))
