"""timm models in transformers' wrappers: its configuration follows, so that its own save and load go on working."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import timm_resize
from tests.helpers.oracle import image, redraw_, stock

hf = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {
    "vit_tiny_patch16_224": {"depth": 1},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1)},
    "levit_128s": {},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
}

SIZE = (192, 256)


def wrapper(name):
    """Return a classifier of transformers around a small timm model, with a configuration as the Hub has it."""
    config = hf.TimmWrapperConfig(architecture=name, model_args=SMALL[name], num_labels=5)
    config.pretrained_cfg = {"input_size": [3, 224, 224], "test_input_size": [3, 288, 288], "crop_pct": 1.0}
    return redraw_(hf.TimmWrapperForImageClassification(config).eval())


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_saved_and_opened(name, tmp_path):
    """What transformers saves of a resized model, it opens with equal weights, outputs and image processor."""
    model = wrapper(name)
    before, was = model.config, copy.deepcopy(model.config)
    timm_resize.resize_(model, SIZE)
    assert before == was
    assert model.config is not before
    model.save_pretrained(tmp_path)
    opened = hf.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert json.loads(json.dumps(model.config.model_args)) == opened.config.model_args
    assert all(map(torch.equal, opened.state_dict().values(), model.state_dict().values()))
    x = image(SIZE)
    torch.testing.assert_close(opened(pixel_values=x).logits, model(pixel_values=x).logits, rtol=1e-5, atol=1e-6)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path)
    assert processor(torch.zeros(3, 300, 200))["pixel_values"].shape == (1, 3, *SIZE)


def test_arguments():
    """The configuration has what stock's constructor needs, no more: windows of Swin, nothing of a ResNet."""
    wanted = {
        "swin_tiny_patch4_window7_224": {"img_size": [192, 256], "window_size": [[6, 8]] * 4},
        "vit_tiny_patch16_224": {"img_size": [192, 256]},
        "resnet18": {},
    }
    for name, arguments in wanted.items():
        model = wrapper(name)
        timm_resize.resize_(model, SIZE)
        assert model.config.model_args == {**SMALL[name], **arguments}


def test_inside_another_module():
    """The wrapper in a module of the user's is resized with its configuration; MultiSize and at_size, too."""
    model = wrapper("vit_tiny_patch16_224")
    holder = torch.nn.ModuleDict({"net": model})
    with timm_resize.at_size(holder, 96):
        assert model.config.model_args["img_size"] == [96, 96]
    assert model.config.model_args == SMALL["vit_tiny_patch16_224"]
    timm_resize.resize_(holder, 96)
    assert model.config.model_args["img_size"] == [96, 96]
    assert timm_resize.MultiSize(model).at(64).config.model_args["img_size"] == [64, 64]
    assert model.config.model_args["img_size"] == [96, 96]


@torch.no_grad()
def test_a_padded_model_inside_a_wrapper():
    """What depends on the timm model as a whole is asked of it, not of what holds it: positions sampled per forward."""
    args = {"depth": 1, "dynamic_img_size": True, "dynamic_img_pad": True}
    config = hf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args, num_labels=5)
    model = redraw_(hf.TimmWrapperForImageClassification(config).eval())
    with pytest.warns(UserWarning, match="each forward resamples"):
        timm_resize.resize_(model, (90, 120))
    theirs = stock("vit_tiny_patch16_224", num_classes=5, **args)
    theirs.set_input_size(img_size=(90, 120))
    theirs.load_state_dict(model.timm_model.state_dict())
    x = image((90, 120))
    torch.testing.assert_close(model(pixel_values=x).logits, theirs(x), rtol=1e-4, atol=1e-4)


def test_backbone():
    """A backbone's features are resized, and the plan says what its configuration cannot."""
    config = hf.TimmBackboneConfig(backbone="levit_128s", use_pretrained_backbone=False, out_indices=(0, 1))
    plan = timm_resize.resize_(hf.TimmBackbone(config), SIZE)
    assert any("no argument for an image size" in note for note in plan.notes)
    config = hf.TimmBackboneConfig(backbone="resnet18", use_pretrained_backbone=False, out_indices=(0, 1))
    assert timm_resize.resize_(hf.TimmBackbone(config), SIZE).notes == ()


def test_state_dicts_of_timm():
    """A state dict of the timm model alone, or of a wrapper, is fitted to a wrapper, whose own load takes either."""
    name = "vit_tiny_patch16_224"
    model, other = wrapper(name), stock(name, num_classes=5, img_size=96, **SMALL[name])
    for start in ("", "timm_model."):
        out = timm_resize.resize_state_dict({start + k: v for k, v in other.state_dict().items()}, model)
        assert out[f"{start}pos_embed"].shape == model.timm_model.pos_embed.shape
        model.load_state_dict(out)
