"""What a model that was made at another size knows of it: which parameters were resampled, and how."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import timm
import torch
from timm.utils import ModelEmaV3

import timm_resize
from tests.helpers.oracle import redraw_

SMALL = {"embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (1, 1, 1)}


@pytest.fixture(scope="module")
def source():
    """A checkpoint's model, at 224 pixels."""
    return redraw_(timm.create_model("levit_128s", **SMALL))


def opened(source, size):
    """A model of the checkpoint, at a size."""
    overlay = {"state_dict": source.state_dict()}
    return timm_resize.create_model(
        "levit_128s", pretrained=True, img_size=size, pretrained_cfg_overlay=overlay, **SMALL
    )


def changed(model, source):
    """Names of the parameters that are not the checkpoint's."""
    theirs = dict(source.named_parameters())
    return {k for k, p in model.named_parameters() if p.shape != theirs[k].shape or not torch.equal(p, theirs[k])}


def test_a_pretrained_model_tells_what_was_resampled(source, caplog):
    """At 208 pixels the first grids change and the last do not; a log at info says it; back at 224 nothing is left."""
    with caplog.at_level(logging.INFO, "timm_resize"):
        model = opened(source, 208)
    want = changed(model, source)
    assert 0 < len(want) < sum("attention_biases" in k for k, _ in model.named_parameters())
    method = "resampled: bicubic over mirrored offsets"
    assert timm_resize.resampled(model) == dict.fromkeys(want, method)
    assert any(
        r.name == "timm_resize" and "224x224 -> 208x208" in r.message and method in r.message for r in caplog.records
    )
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.nn.Sequential(model)):
        assert timm_resize.resampled(other).keys() == want
    timm_resize.resize_(model, 320)
    assert timm_resize.resampled(model).keys() == changed(model, source) > want
    timm_resize.resize_(model, 224)
    assert timm_resize.resampled(model) == {}
    assert changed(model, source) == set()


def test_groups_and_freezing_without_a_plan(source):
    """Both take what the model itself knows, for a model from create_model and for one from a file."""
    model = opened(source, 208)
    names = {id(p): k for k, p in model.named_parameters()}
    want = changed(model, source)
    groups = timm_resize.param_groups(model, lr=1e-4, resized_lr=1e-2)
    assert {names[id(p)] for g in groups if g["lr"] == 1e-2 for p in g["params"]} == want
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert timm_resize.freeze_unresized_(model) == len(want)
    assert {k for k, p in model.named_parameters() if p.requires_grad} == want


def test_a_checkpoint_of_another_size(source, tmp_path):
    """A resized state dict leaves no originals; all tables are named alike."""
    torch.save(source.state_dict(), tmp_path / "file.pth")
    model = timm_resize.create_model("levit_128s", img_size=320, checkpoint_path=str(tmp_path / "file.pth"), **SMALL)
    assert timm_resize.resampled(model).keys() == changed(model, source)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda m, o: {"optimizer": torch.optim.lr_scheduler.StepLR(o, 1)}, "optimizer=StepLR is not an optimizer"),
        (lambda m, o: {"optimizer": list(m.parameters())}, "optimizer=Parameter is not an optimizer"),
        (lambda m, o: {"optimizer": m.parameters()}, "optimizer=generator is not an optimizer"),
        (lambda m, o: {"optimizer": "last.pth"}, "optimizer=str is not an optimizer"),
        (lambda m, o: {"optimizer": o.state_dict()}, "optimizer=dict is not an optimizer"),
        (lambda m, o: {"optimizer": [o, None]}, "optimizer=NoneType is not an optimizer"),
        (lambda m, o: {"ema": m.state_dict()}, "ema=OrderedDict is not a model"),
        (lambda m, o: {"ema": "last.pth"}, "ema=str is not a model"),
        (lambda m, o: {"ema": [ModelEmaV3(m), o]}, "ema=SGD is not a model"),
        (lambda m, o: {"ema": timm.create_model("vit_tiny_patch16_224", img_size=96, depth=1)}, "ema is a Vision"),
    ],
)
def test_what_follows_no_model(given, text):
    """A scheduler, parameters, a path or a state dict in the place of an optimizer or a copy: said, nothing changed."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    before = model.pos_embed.detach().clone()
    with pytest.raises(timm_resize.ResizeError, match=text):
        timm_resize.resize_(model, 256, **given(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    assert torch.equal(model.pos_embed, before)
