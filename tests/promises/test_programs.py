"""timm models inside the programs that people use, through those programs' own interfaces."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import timm_resize
from tests.helpers.oracle import image, redraw_, stock

SMALL = {
    "vit_tiny_patch16_224": {"depth": 1},
    "levit_128s": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1)},
}


def test_user_modules_and_sequentials():
    """A module of the user's that holds one timm model is resized; with several, all are listed."""
    for wrap in (
        lambda m: nn.Sequential(m, nn.ReLU()),
        lambda m: nn.ModuleDict({"backbone": m, "neck": nn.Linear(1, 1)}),
    ):
        model = redraw_(stock("vit_tiny_patch16_224", depth=1))
        timm_resize.resize_(wrap(model), (96, 160))
        assert model.patch_embed.grid_size == (6, 10)
    both = nn.ModuleDict({"teacher": stock("resnet18"), "student": nn.Sequential(stock("levit_128s"))})
    with pytest.raises(timm_resize.UnsupportedModelError) as caught:
        timm_resize.resize_(both, 96)
    assert str(caught.value) == (
        "ModuleDict: holds 2 models: teacher (ResNet), student.0 (LevitDistilled). Resize the one you mean."
    )


@pytest.mark.parametrize("name", SMALL)
def test_open_clip(name):
    """open_clip's timm tower takes another size, which its own constructor cannot give this family."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    from open_clip.timm_model import TimmModel

    tower = TimmModel(name, embed_dim=16, image_size=224, pool="avg" if "swin" in name else "", proj="linear").eval()
    alone = stock(name, num_classes=0)
    assert open_clip is not None
    timm_resize.resize_(tower, (192, 256))
    with torch.no_grad():
        assert tower(image((192, 256))).shape == (1, 16)
    timm_resize.resize_(alone, (192, 256))
    shapes = {k: v.shape for k, v in alone.state_dict().items() if not k.startswith(("head", "fc"))}
    inner = tower.trunk.state_dict()
    assert {k: inner[k].shape for k in shapes if k in inner} == {k: v for k, v in shapes.items() if k in inner}
    assert len(set(shapes) & set(inner)) > 20


@pytest.mark.parametrize("name", SMALL)
def test_transformers(name):
    """transformers' TimmWrapper is resized, and its outputs are those of the timm model resized alone."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.TimmWrapperConfig(architecture=name, model_args=SMALL[name], num_labels=5)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    alone = stock(name, num_classes=5, **SMALL[name])
    alone.load_state_dict(model.timm_model.state_dict())
    for each in (model, alone):
        timm_resize.resize_(each, (192, 256))
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=image((192, 256))).logits, alone(image((192, 256))))


def test_transformers_backbone():
    """TimmBackbone, which wraps features_only, gives the maps of the new size."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.TimmBackboneConfig(backbone="levit_128s", use_pretrained_backbone=False, out_indices=(0, 1))
    backbone = transformers.TimmBackbone(config).eval()
    timm_resize.resize_(backbone, (192, 256))
    with torch.no_grad():
        maps = backbone(pixel_values=image((192, 256))).feature_maps
    assert [tuple(m.shape[-2:]) for m in maps] == [(12, 16), (6, 8)]


@pytest.mark.parametrize("name", ["tu-resnet18", "tu-swin_tiny_patch4_window7_224", "tu-maxvit_pico_rw_256"])
def test_segmentation_models(name):
    """A network on a `tu-` encoder is resized as a whole and segments images of the new size."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    model = smp.Unet(name, encoder_weights=None, classes=2).eval()
    timm_resize.resize_(model, (256, 320))
    with torch.no_grad():
        assert model(image((256, 320))).shape == (1, 2, 256, 320)


def test_with_the_plugin_installed_the_method_is_there():
    """`hasattr(model, 'set_input_size')` is how people ask: every wrapper of timm's has it, and it works."""
    with timm_resize.install():
        for kwargs in ({}, {"features_only": True, "out_indices": (0, 1)}):
            model = timm.create_model("levit_128s", **kwargs)
            model.set_input_size((192, 256))
            assert timm_resize.plan_resize(model).new_size == (192, 256)
