"""An architecture of timm's that has no handler, as a newer timm may have: `create_model` finds out by builds."""

from __future__ import annotations

import sys
import warnings

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.models import _registry as registry
from timm.models import build_model_with_cfg, register_model
from torch import nn

import timm_resize


class NewNet(nn.Module):
    """A ViT in little, under timm's conventions."""

    def __init__(self, img_size=64, in_chans=3, num_classes=4, dim=8, depth=1, **_):
        super().__init__()
        self.num_classes = num_classes
        self.patch_embed = PatchEmbed(img_size, 16, in_chans, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches, dim))
        self.blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.head = nn.Linear(dim, num_classes)

    def reset_classifier(self, num_classes):
        self.head = nn.Linear(self.head.in_features, num_classes)

    def forward(self, x):
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


class NewCnn(nn.Module):
    """A network that takes any size, and no `img_size`."""

    def __init__(self, in_chans=3, num_classes=4):
        super().__init__()
        self.num_classes = num_classes
        self.conv, self.head = nn.Conv2d(in_chans, 8, 3, 2), nn.Linear(8, num_classes)

    def reset_classifier(self, num_classes):
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


class NewFixed(NewCnn):
    """A network that takes one size alone, and no `img_size`."""

    def forward(self, x):
        return self.head(self.conv(x).reshape(len(x), 8, 31, 31).mean((2, 3)))


default_cfgs = {
    name: {"input_size": (3, 64, 64), "num_classes": 4, "first_conv": "conv", "classifier": "head"}
    for name in ("newnet_tiny", "newcnn_tiny", "newfixed_tiny")
}


def newnet_tiny(pretrained=False, **kwargs):
    return build_model_with_cfg(NewNet, "newnet_tiny", pretrained, **kwargs)


def newcnn_tiny(pretrained=False, **kwargs):
    return build_model_with_cfg(NewCnn, "newcnn_tiny", pretrained, **kwargs)


def newfixed_tiny(pretrained=False, **kwargs):
    return build_model_with_cfg(NewFixed, "newfixed_tiny", pretrained, **kwargs)


ENTRIES = (newnet_tiny, newcnn_tiny, newfixed_tiny)


@pytest.fixture(autouse=True)
def _registered():
    for entry in ENTRIES:
        register_model(entry)
    with timm_resize.registry.override():
        yield
    for name in (entry.__name__ for entry in ENTRIES):
        registry._clear_model_entries(name)
        registry._model_entrypoints.pop(name)
    del sys.modules[__name__].__all__


def test_taught_once_with_a_warning():
    """The first model warns; it and later ones, of other depths too, can be resized as any of timm's."""
    with pytest.warns(UserWarning, match="NewNet has no handler"):
        model = timm_resize.create_model("newnet_tiny", img_size=(96, 64))
    assert model.pos_embed.shape[1] == 24
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_resize.create_model("newnet_tiny", img_size=128)
    timm_resize.resize_(model, (64, 128))
    fresh = timm.create_model("newnet_tiny", img_size=(64, 128))
    assert model.pos_embed.shape == fresh.pos_embed.shape
    assert model.patch_embed.grid_size == fresh.patch_embed.grid_size
    assert model(torch.zeros(1, 3, 64, 128)).shape == (1, 4)
    with pytest.warns(UserWarning, match="NewNet has no handler"):
        deeper = timm_resize.create_model("newnet_tiny", img_size=96, depth=2)
    assert timm_resize.plan_resize(deeper, 64).tensors


def test_pretrained_at_another_size(tmp_path):
    """Weights of a file go through the map that was found, as timm's own resampling would have them."""
    source = timm.create_model("newnet_tiny")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="NewNet has no handler"):
        model = timm_resize.create_model(
            "newnet_tiny", pretrained=True, img_size=96, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")}
        )
    want = timm.layers.resample_abs_pos_embed(source.pos_embed, new_size=[6, 6], num_prefix_tokens=0)
    assert torch.allclose(model.pos_embed, want, atol=1e-6)
    assert torch.equal(model.head.weight, source.head.weight)


def test_a_constructor_without_img_size():
    """A network that takes any size is accepted as it is; one that does not is refused, with what was tried."""
    with pytest.warns(UserWarning, match="NewCnn has no handler"):
        model = timm_resize.create_model("newcnn_tiny", img_size=(96, 160))
    assert timm_resize.plan_resize(model).new_size == (96, 160)
    with pytest.raises(timm_resize.UnsupportedModelError, match="NewFixed has no handler, and .* does not run on one"):
        timm_resize.create_model("newfixed_tiny", img_size=96)
