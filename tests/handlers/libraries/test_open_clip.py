"""open_clip's towers and models, against its own builds at the new size and its own `resize_pos_embed`."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

import timm_resize
from tests.helpers.oracle import assert_same_structure, image, redraw_, stock

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP, resize_pos_embed  # noqa: E402
from open_clip.push_to_hf_hub import save_config_for_hf  # noqa: E402
from open_clip.timm_model import TimmModel  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

VISION = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
POOLED = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 3}
LEVIT = {"timm_model_name": "levit_128s", "timm_pool": "", "timm_proj": "linear"}
TOKENS = torch.randint(1, 20, (1, 7), generator=torch.Generator().manual_seed(0))


def clip(size, cls=CLIP, **vision):
    """Return a small model with the preprocessing that open_clip's factory gives one."""
    torch.manual_seed(0)
    model = redraw_(cls(16, vision_cfg={**VISION, **vision, "image_size": size}, text_cfg=TEXT)).eval()
    open_clip.set_model_preprocess_cfg(model, {**vars(PreprocessCfg()), "size": model.visual.image_size})
    return model


def parameters_agree(model, theirs):
    for (name, got), want in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("cls", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize(
    ("vision", "sizes"),
    [
        ({}, [128, 32, (64, 96), (128, 64)]),
        ({"pos_embed_type": "sin_cos_2d"}, [128, 32]),  # open_clip builds squares alone
        ({**POOLED, "patch_dropout": 0.5, "pool_type": "avg"}, [96, (32, 64)]),
    ],
    ids=["plain", "sin-cos", "pooled"],
)
@torch.no_grad()
def test_vit(cls, vision, sizes):
    """Structure, positions and outputs are those of its build at the size, loaded by its own rule; texts too."""
    model = clip(64, cls, **vision)
    for size in sizes:
        resized, theirs = copy.deepcopy(model), clip(size, cls, **vision)
        timm_resize.resize_(resized, size)
        assert_same_structure(resized, theirs)
        loaded = copy.deepcopy(model.state_dict())
        resize_pos_embed(loaded, theirs)
        theirs.load_state_dict(loaded)
        parameters_agree(resized, theirs)
        x = image(resized.visual.image_size)
        torch.testing.assert_close(resized(x, TOKENS)[0], theirs(x, TOKENS)[0], rtol=0, atol=1e-5)
        assert torch.equal(resized.encode_text(TOKENS), model.encode_text(TOKENS))


@torch.no_grad()
def test_resnet():
    """The attention pool follows; open_clip builds squares alone and has no rule for its positions."""
    model = clip(64, **RESNET)
    for size in (128, 32):
        resized, theirs = copy.deepcopy(model), clip(size, **RESNET)
        timm_resize.resize_(resized, size)
        assert_same_structure(resized, theirs)
        theirs.load_state_dict(resized.state_dict())
        assert torch.equal(resized.encode_image(image((size, size))), theirs.encode_image(image((size, size))))
    timm_resize.resize_(model, (64, 96))
    assert model.visual.image_size == model.visual.preprocess_cfg["size"] == (64, 96)
    assert model.encode_image(image((64, 96))).shape == (1, 16)
    with pytest.raises(timm_resize.InvalidSizeError, match="takes 2 to 2 by 3 to 3"):  # as many cells, elsewhere
        model.encode_image(image((96, 64)))


@torch.no_grad()
def test_timm_tower():
    """The timm model inside follows, and the tower's record and preprocessing with it, as open_clip's own method."""
    model, theirs = (clip(224, **LEVIT) for _ in range(2))
    timm_resize.resize_(model, 128)
    theirs.visual.trunk = stock("levit_128s", num_classes=0, img_size=128)
    theirs.visual.set_input_size(128)  # its record alone, as levit has no such method
    theirs.visual.preprocess_cfg["size"] = theirs.visual.image_size
    assert_same_structure(model, theirs)
    theirs.load_state_dict(model.state_dict())
    assert torch.equal(model.encode_image(image((128, 128))), theirs.eval().encode_image(image((128, 128))))


@torch.no_grad()
def test_timm_tower_with_a_pool():
    """An attention pool of open_clip's after a convolutional model follows the map."""
    tower = redraw_(TimmModel("resnet18", 512, image_size=224, pool="abs_attn", proj=None)).eval()
    timm_resize.resize_(tower, (96, 160))
    assert tower.head.pool.feat_size == (3, 5)
    assert tower.head.pool.pos_embed.shape == (16, 512)
    assert tower(image((96, 160))).shape == (1, 512)
    with pytest.raises(timm_resize.ResizeError, match="patch_size=.* is not an option of this model"):
        timm_resize.resize_(tower, 96, patch_size=8)


def test_windows_of_a_timm_tower():
    """Options are the timm model's, and windows of a file are read from its tables."""
    towers = [TimmModel("levit_128s", 8, image_size=224, pool="") for _ in range(2)]
    for tower in towers:
        tower.trunk = stock("swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1, 1, 1), embed_dim=24)
    timm_resize.resize_(towers[0], 256, window_size=8)
    assert towers[0].trunk.layers[0].blocks[0].window_size == (8, 8)
    assert towers[0].image_size == (256, 256)
    towers[1].load_state_dict(
        timm_resize.resize_state_dict(towers[0].state_dict(), towers[1], source=256), strict=False
    )


def test_a_timm_tower_that_records_another_size():
    """Where the tower's record is not the timm model's size, asking for either brings both there."""
    tower = TimmModel("levit_128s", 8, image_size=192, pool="")
    for size in (224, 192):
        timm_resize.resize_(tower, size)
        assert tower.image_size == tower.trunk._traits["img_size"] == (size, size)


@torch.no_grad()
def test_coca():
    """CoCa's image tower follows, its decoder does not."""
    decoder = {**TEXT, "attn_pooler_heads": 2}
    vision = {**VISION, **POOLED, "output_tokens": True}
    model = CoCa(16, decoder, {**TEXT, "embed_cls": True, "output_tokens": True}, vision).eval()
    plan = timm_resize.resize_(model, (32, 96))
    assert [change.key for change in plan.tensors] == ["visual.positional_embedding"]
    assert model.encode_image(image((32, 96))).shape == (1, 16)


def test_preprocessing():
    """open_clip's own transform, made from the model's configuration, gives images of the new size."""
    model = clip(64)
    timm_resize.resize_(model, (32, 96))
    transform = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), is_train=False)
    assert transform(open_clip_image()).shape == (3, 32, 96)


def open_clip_image():
    from PIL import Image

    return Image.new("RGB", (100, 80))


@torch.no_grad()
def test_state_dicts_and_several_sizes():
    """A checkpoint of another size is fitted, its size guessed; MultiSize and at_size run both towers."""
    model, large = clip(64), clip(128)
    fitted = timm_resize.resize_state_dict({f"module.{k}": v for k, v in model.state_dict().items()}, large)
    want = copy.deepcopy(model.state_dict())
    resize_pos_embed(want, large)
    assert fitted.keys() == want.keys()
    torch.testing.assert_close(fitted["visual.positional_embedding"], want["visual.positional_embedding"])
    assert torch.equal(fitted["positional_embedding"], want["positional_embedding"])
    resized, x = copy.deepcopy(model), image((96, 32))
    timm_resize.resize_(resized, (96, 32))
    assert torch.equal(timm_resize.MultiSize(model)(x, TOKENS)[0], resized(x, TOKENS)[0])
    with timm_resize.at_size(model, (96, 32)):
        assert torch.equal(model(x, TOKENS)[0], resized(x, TOKENS)[0])
    assert model.visual.image_size == (64, 64)


def test_an_input_of_another_grid():
    """As many patches at other places would get the positions of others: refused."""
    model = clip(64)
    timm_resize.resize_(model, (32, 96))
    with pytest.raises(timm_resize.InvalidSizeError, match="takes 32 to 47 by 96 to 111"):
        model.encode_image(image((96, 32)))


@torch.no_grad()
def test_its_own_save_opens_at_the_size(tmp_path):
    """As `push_to_hf_hub` writes a model, with the size in the configuration: open_clip builds that and loads."""
    model = clip(64)
    timm_resize.resize_(model, (96, 64))
    config = {"embed_dim": 16, "vision_cfg": {**VISION, "image_size": list(model.visual.image_size)}, "text_cfg": TEXT}
    save_config_for_hf(model, tmp_path / "open_clip_config.json", config)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    opened = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    assert tuple(opened.visual.image_size) == (96, 64)
    torch.testing.assert_close(opened.encode_image(image((96, 64))), model.encode_image(image((96, 64))))
