"""Every class of model, resized and saved: opened by stock timm where its constructor can, by the plugin always."""

from __future__ import annotations

import warnings

import pytest
import torch

import timm_resize
from tests.helpers.examples import example, sweep
from tests.helpers.forks import in_forks, without_the_package
from tests.helpers.oracle import first, image
from tests.helpers.stock_reader import read
from timm_resize.core.find import current_size
from timm_resize.hub.save import save_pretrained, stock_misfit

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


@pytest.mark.parametrize("name", sweep(turn=0, of=6))
def test_square_sizes_open_in_stock_timm(name, tmp_path):
    """In a process where importing this package fails: equal bits, equal outputs, the input size."""
    folder = tmp_path / name
    model, output = saved(name, (-64, -64), folder)
    assert (stock_misfit(folder) or "") == REFUSED.get(name, "")
    if name in REFUSED:
        return

    def user():
        without_the_package()
        read(folder)

    in_forks(user)
    seen = torch.load(folder / "seen.pt")
    assert_same(seen["state"], model.state_dict())
    assert torch.equal(first(seen["output"]), first(output))
    assert seen["input_size"][1:] == current_size(model)


@pytest.mark.parametrize("name", sweep(turn=1, of=6))
def test_non_square_sizes_open_with_the_plugin(name, tmp_path):
    """Equal bits and outputs, whatever stock's constructor can."""
    model, output = saved(name, (32, 96), tmp_path / name)
    for asked in ({}, {"img_size": current_size(model)}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = timm_resize.create_model(f"local-dir:{tmp_path / name}", pretrained=True, **asked)
        assert_same(again.state_dict(), model.state_dict())
        with torch.no_grad():
            assert torch.equal(first(again.eval()(torch.load(tmp_path / name / "image.pt"))), first(output))
