"""timm models inside the programs that people use, through those programs' own interfaces."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import timm_resize
from tests.helpers.forks import in_forks, without_the_package
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


def at_size(model, name, size, **kwargs):
    """Return stock's model of that size with the weights of `model`: by its own method, else by its constructor."""
    theirs = stock(name, **kwargs)
    if hasattr(theirs, "set_input_size"):
        theirs.set_input_size(img_size=size)
    else:
        theirs = stock(name, img_size=size, **kwargs)
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


SIZE = (192, 256)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_open_clip(name):
    """open_clip's timm tower takes another size: the embedding is the tower's around stock's trunk of the size."""
    pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    from open_clip.timm_model import TimmModel

    pool = "avg" if "swin" in name else ""
    tower = redraw_(TimmModel(name, embed_dim=16, image_size=224, pool=pool, proj="linear").eval())
    theirs = copy.deepcopy(tower)
    timm_resize.resize_(tower, SIZE)
    kwargs = {"num_classes": 0, **({"global_pool": pool} if pool else {})}
    theirs.trunk = at_size(tower.trunk, name, SIZE, **kwargs)
    got = tower(image(SIZE))
    assert got.shape == (1, 16)
    torch.testing.assert_close(got, theirs(image(SIZE)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_transformers(name):
    """transformers' TimmWrapper is resized, and its outputs are those of stock's model of the size."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.TimmWrapperConfig(architecture=name, model_args=SMALL[name], num_labels=5)
    model = redraw_(transformers.TimmWrapperForImageClassification(config).eval())
    timm_resize.resize_(model, SIZE)
    theirs = at_size(model.timm_model, name, SIZE, num_classes=5, **SMALL[name])
    torch.testing.assert_close(model(pixel_values=image(SIZE)).logits, theirs(image(SIZE)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transformers_backbone():
    """TimmBackbone, which wraps features_only, gives the maps of stock's features of the new size."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.TimmBackboneConfig(backbone="levit_128s", use_pretrained_backbone=False, out_indices=(0, 1))
    backbone = redraw_(transformers.TimmBackbone(config).eval())
    timm_resize.resize_(backbone, SIZE)
    theirs = stock("levit_128s", features_only=True, out_indices=(0, 1), img_size=SIZE)
    theirs.load_state_dict(backbone._backbone.state_dict())
    maps = backbone(pixel_values=image(SIZE)).feature_maps
    assert [tuple(m.shape[-2:]) for m in maps] == [(12, 16), (6, 8)]
    for ours, want in zip(maps, theirs(image(SIZE)), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "built"),
    [
        ("tu-resnet18", {}),
        ("tu-swin_tiny_patch4_window7_224", {"img_size": (256, 320), "window_size": (8, 10)}),  # as its set_input_size
        pytest.param("tu-maxvit_pico_rw_256", {"img_size": (256, 320)}, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_segmentation_models(name, built):
    """A network on a `tu-` encoder is resized as a whole: its masks are those around stock's model of the size."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    size = (256, 320)
    model = redraw_(smp.Unet(name, encoder_weights=None, classes=2).eval())
    theirs = smp.Unet(name, encoder_weights=None, classes=2, **built).eval()
    timm_resize.resize_(model, size)
    theirs.load_state_dict(model.state_dict())
    got = model(image(size))
    assert got.shape == (1, 2, *size)
    torch.testing.assert_close(got, theirs(image(size)), rtol=1e-3, atol=1e-3)


def test_with_the_plugin_installed_the_method_is_there():
    """`hasattr(model, 'set_input_size')` is how people ask: every wrapper of timm's has it, and it works."""
    with timm_resize.install():
        for kwargs in ({}, {"features_only": True, "out_indices": (0, 1)}):
            model = timm.create_model("levit_128s", **kwargs)
            model.set_input_size((192, 256))
            assert timm_resize.plan_resize(model).new_size == (192, 256)


@torch.no_grad()
def test_a_saved_folder_opens_in_transformers(tmp_path):
    """Its Auto classes and its pipeline, in a process without this package, give the model's own answer at its size."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = redraw_(stock("levit_128s", num_classes=3))
    timm_resize.resize_(model, SIZE)
    timm_resize.save_pretrained(model, tmp_path / "saved")
    x = image(SIZE)
    want = model(x)

    def opened():
        without_the_package()
        from PIL import Image

        theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
        classify = transformers.pipeline("image-classification", model=str(tmp_path / "saved"))
        picture = Image.new("RGB", SIZE[::-1], "red")
        pixels = classify.image_processor(picture, return_tensors="pt")["pixel_values"]
        return (
            theirs(pixel_values=x).logits.tolist(),
            tuple(pixels.shape),
            [found["label"] for found in classify(picture)],
        )

    [(logits, shape, labels)] = in_forks(opened)
    torch.testing.assert_close(torch.tensor(logits), want, rtol=1e-5, atol=1e-5)
    assert shape == (1, 3, *SIZE)
    assert len(labels) == 3
