"""Preprocessing follows a resize, through every name of timm's function, and stock's own rules hold otherwise."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config, resolve_input_data_config, resolve_model_data_config

import timm_resize
from tests.helpers.oracle import stock


@pytest.mark.parametrize(
    "name", ["resnet18.a1_in1k", "vit_tiny_patch16_224", "levit_128s", "naflexvit_base_patch16_gap"]
)
def test_follows_a_resize(name):
    """Every spelling gives the new size while the plugin is installed, and stock's answer before and afterwards."""
    with torch.device("meta"):
        model = stock(name)
    spellings = (
        lambda: resolve_data_config({}, model=model),
        lambda: resolve_data_config(model.pretrained_cfg, model=model),
        lambda: resolve_model_data_config(model),
        lambda: resolve_model_data_config(model, use_test_size=True),
        lambda: timm.data.resolve_data_config({}, model=model, use_test_size=True),
    )
    before = [spelling() for spelling in spellings]
    with timm_resize.install():
        assert [spelling() for spelling in spellings] == before
        timm_resize.resize_(model, (192, 256))
        for spelling, old in zip(spellings, before, strict=True):
            assert spelling() == {**old, "input_size": (3, 192, 256)}
    assert [spelling() for spelling in spellings] == before
    assert timm_resize.data_config(model) == {**before[0], "input_size": (3, 192, 256)}


def test_what_the_caller_asks_for_holds():
    """Explicit sizes, channels and means win, as in stock."""
    model = timm_resize.create_model("test_resnet", img_size=96)
    assert timm_resize.data_config(model, in_chans=1, crop_pct=0.5)["input_size"] == (1, 96, 96)
    with timm_resize.install():
        assert resolve_data_config({"input_size": (3, 64, 64)}, model=model)["input_size"] == (3, 64, 64)
        assert resolve_data_config({"img_size": 128}, model=model)["input_size"] == (3, 128, 128)
        assert resolve_data_config({"in_chans": 1}, model=model)["input_size"] == (1, 96, 96)
        assert resolve_data_config({"mean": (0.1, 0.2, 0.3)}, model=model)["mean"] == (0.1, 0.2, 0.3)
        assert resolve_data_config({}, pretrained_cfg={"input_size": (3, 8, 8)})["input_size"] == (3, 8, 8)


def test_what_stock_built_at_a_size_has_that_size():
    """A model has one size, whoever gave it: timm's function says the one that the constructor took."""
    with timm_resize.install():
        model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=1)
        assert resolve_data_config({}, model=model)["input_size"] == (3, 96, 96)
    assert timm_resize.data_config(model)["input_size"] == (3, 96, 96)


def test_the_transform_makes_images_of_the_size():
    """What timm builds from the configuration gives the model its size."""
    from PIL import Image

    model = timm_resize.create_model("vit_tiny_patch16_224", img_size=(96, 160), depth=1)
    transform = create_transform(**timm_resize.data_config(model))
    assert transform(Image.new("RGB", (300, 200))).shape == (3, 96, 160)


def test_the_function_is_itself_again():
    """Uninstalling restores the code object of the function, which was the same object throughout."""
    function, code = timm.data.resolve_data_config, timm.data.resolve_data_config.__code__
    with timm_resize.install():
        assert timm.data.resolve_data_config is function
        assert function.__code__ is not code
    assert function.__code__ is code


@pytest.mark.parametrize(("name", "fixed"), [("levit_128s", True), ("test_resnet", False)])
def test_the_configuration_that_newer_scripts_ask_for(name, fixed):
    """`resolve_input_data_config` gives a resized model's size, and refuses another where the model takes none."""
    with timm_resize.install():
        model = timm.create_model(name, img_size=(96, 128), num_classes=2)
        for use_test_size in (False, True):
            assert resolve_input_data_config(model, {}, None, use_test_size)["input_size"] == (3, 96, 128)
        assert resolve_input_data_config(model, {"img_size": (96, 128)})["input_size"] == (3, 96, 128)
        if fixed:
            with pytest.raises(ValueError, match=r"Requested image size \(64, 64\)"):
                resolve_input_data_config(model, {"img_size": 64})
        else:
            assert resolve_input_data_config(model, {"img_size": 64})["input_size"] == (3, 64, 64)
        own = timm.create_model(name, num_classes=2)
        assert resolve_input_data_config(own)["input_size"] == own.pretrained_cfg["input_size"]
