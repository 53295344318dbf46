"""Checkpoints of one size into models of another."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_patch_embed
from torch.nn.utils import prune

import timm_resize
from tests.helpers.oracle import redraw_, stock, tensors


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def at(size, **kwargs):
    """A redrawn one-block ViT at a size."""
    return redraw_(stock("vit_tiny_patch16_224", img_size=size, depth=1, num_classes=2, **kwargs), seed=5)


@pytest.mark.parametrize("target", [96, 160, (96, 160)])
def test_a_file_that_is_not_of_the_configured_size_is_read_at_its_own(tmp_path, target):
    """A file saved at 96 by a model configured for 224 is resized from 96, never through 224; at 96 it is exact."""
    model = at(96)
    path = str(tmp_path / "weights.safetensors")
    save_file(model.state_dict(), path)
    args = dict(img_size=target, depth=1, num_classes=2, pretrained=True)
    overlay = dict(file=path, num_classes=2)
    ours = timm_resize.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=overlay, **args)
    want = copy.deepcopy(model)
    timm_resize.resize_(want, target)
    assert all(torch.equal(t, tensors(want)[n]) for n, t in tensors(ours).items())


def test_a_file_of_the_asked_patch_size_is_read_as_it_is(tmp_path):
    """A file saved at patch 8 and 96 px, asked for so, loads bit for bit although the name says patch 16, 224 px."""
    model = at(96, patch_size=8)
    path = str(tmp_path / "weights.safetensors")
    save_file(model.state_dict(), path)
    ours = timm_resize.create_model(
        "vit_tiny_patch16_224",
        img_size=96,
        patch_size=8,
        depth=1,
        num_classes=2,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=path, num_classes=2),
    )
    assert all(torch.equal(t, tensors(model)[n]) for n, t in tensors(ours).items())


def test_a_state_dict_of_another_patch_size_is_fitted():
    """Patch 16 into patch 8 equals stock's own `set_input_size` with that patch size."""
    coarse, fine = at(96), at(96, patch_size=8)
    fine.load_state_dict(timm_resize.resize_state_dict(coarse.state_dict(), fine))
    coarse.set_input_size((96, 96), patch_size=8)
    for name, tensor in tensors(fine).items():
        torch.testing.assert_close(tensor, tensors(coarse)[name], atol=2e-5, rtol=0)


def test_state_dicts_are_fitted_by_source():
    """With `source` a non-square checkpoint is resampled from its own grid, though 7x28 has as many tokens as 14x14."""
    wide, square = at((112, 448)), at(224)
    fitted = timm_resize.resize_state_dict(wide.state_dict(), square, source=(112, 448))
    theirs = copy.deepcopy(wide)
    theirs.set_input_size((224, 224))
    torch.testing.assert_close(fitted["pos_embed"], theirs.pos_embed, atol=1e-5, rtol=0)
    assert not torch.equal(fitted["pos_embed"], wide.pos_embed)
    assert fitted["blocks.0.attn.qkv.weight"].data_ptr() == wide.blocks[0].attn.qkv.weight.data_ptr()


def test_a_checkpoint_of_no_known_size_asks_for_the_source():
    """Non-square and not on record: the error asks for `source`, and a wrong one is named."""
    wide, square = at((64, 256)), at(96)
    with pytest.raises(timm_resize.CheckpointError, match=r"pos_embed is \(1, 60, 192\), not \(1, 37, 192\)\. Give"):
        timm_resize.resize_state_dict(
            {k: v[:, :60] if k == "pos_embed" else v for k, v in wide.state_dict().items()}
            | {"pos_embed": wide.pos_embed[:, :60]},
            square,
        )
    with pytest.raises(timm_resize.CheckpointError, match=r"the checkpoint is not of source=\(128, 256\)"):
        timm_resize.resize_state_dict(wide.state_dict(), square, source=(128, 256))


def test_a_stock_model_of_the_same_size_gets_the_dict_as_it_is():
    """Nothing to fit: the same tensor objects come back."""
    model = at(96)
    state = model.state_dict()
    assert all(v is state[k] for k, v in timm_resize.resize_state_dict(state, model).items())


def test_stale_masks_and_indices_are_left_out():
    """Swin checkpoints of timm 0.4 to 0.6 hold masks and indices of their size, which the model computes itself."""
    small, large = (stock("swin_tiny_patch4_window7_224", img_size=s, embed_dim=12, depths=(2, 2)) for s in (224, 112))
    old = {k: v for k, v in small.named_buffers() if k.endswith(("attn_mask", "relative_position_index"))}
    assert {k.rsplit(".", 1)[1] for k in old} == {"attn_mask", "relative_position_index"}
    fitted = timm_resize.resize_state_dict({**small.state_dict(), **old}, large, window_policy="keep")
    assert fitted.keys() == large.state_dict().keys()
    large.load_state_dict(fitted)


def test_a_persistent_index_is_the_models_own():
    """EfficientFormer saves its index: the fitted dict holds the target's, and loads strictly."""
    shrunk = dict(depths=(1, 1, 1, 3), num_vit=2, mlp_ratios=1)
    small = stock("efficientformer_l1", **shrunk)
    large = timm_resize.create_model("efficientformer_l1", img_size=256, **shrunk)
    want = {k: v.clone() for k, v in large.state_dict().items() if k.endswith("attention_bias_idxs")}
    large.load_state_dict(timm_resize.resize_state_dict(small.state_dict(), large))
    assert want
    assert all(torch.equal(large.state_dict()[k], v) for k, v in want.items())


def test_a_pruned_model_is_not_another_model():
    """A state dict of a model that is pruned as the target is names what to call, not another architecture."""
    saved, target = (at(size) for size in (96, 160))
    for model in (saved, target):
        prune.l1_unstructured(model, "pos_embed", 0.5)
    with pytest.raises(
        timm_resize.UnsupportedModelError, match=re.escape("Call torch.nn.utils.prune.remove(module, 'p")
    ):
        timm_resize.resize_state_dict(saved.state_dict(), target)


def test_a_mixer_of_another_patch_size():
    """A stem's patches are read from its projection, as a ViT's are from its patch embedding."""
    small, target = (stock("mixer_s32_224", num_classes=2) for _ in range(2))
    redraw_(small)
    timm_resize.resize_(small, 112, patch_size=16)
    got = timm_resize.resize_state_dict(small.state_dict(), target, source=112)
    assert small.stem.proj.weight.shape[2:] == (16, 16)
    torch.testing.assert_close(got["stem.proj.weight"], resample_patch_embed(small.stem.proj.weight.detach(), (32, 32)))


def test_a_pretrained_file_of_another_patch_size_gives_the_model_asked_for():
    """As by `resize_state_dict`: the file's patches are resampled to those of the architecture."""
    saved, into = at(96), at(160)
    timm_resize.resize_(saved, 48, patch_size=8)
    overlay = {"state_dict": saved.state_dict(), "num_classes": 2}
    built = timm_resize.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        img_size=160,
        source_size=48,
        depth=1,
        num_classes=2,
    )
    want = timm_resize.resize_state_dict(saved.state_dict(), into, source=48)
    assert built.patch_embed.patch_size == (16, 16)
    for key, value in built.state_dict().items():
        torch.testing.assert_close(value, want[key])
