"""SAM's ViT: resized ahead of time to what stock's forward would interpolate each time."""

from __future__ import annotations

import copy

import pytest
import torch

import timm_resize
from tests.helpers.oracle import assert_same_structure, image, redraw_, stock
from tests.helpers.transposed import transposed

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "global_attn_indexes": (1,), "num_classes": 3}


@pytest.fixture(scope="module")
def model():
    """A redrawn model with a position map: one block with windows of 14, one global block, at 224."""
    return redraw_(stock("samvit_base_patch16_224", use_abs_pos=True, **TINY))


@pytest.mark.parametrize("size", [(320, 320), (160, 160), (192, 320), (320, 192), (240, 240)])
def test_resized_model_computes_what_the_unresized_one_does_at_that_size(model, size):
    """Stock interpolates position map and offset tables in each forward; after the resize nothing is left to do."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, size)
    assert ours.pos_embed.shape[1:3] == (size[0] // 16, size[1] // 16)
    assert ours.blocks[1].attn.rel_pos_h.shape[0] == 2 * (size[0] // 16) - 1
    assert ours.blocks[1].attn.rel_pos_w.shape[0] == 2 * (size[1] // 16) - 1
    with torch.inference_mode():
        x = image(size)
        torch.testing.assert_close(ours(x), model(x), atol=1e-5, rtol=1e-5)


def test_only_global_blocks_change(model):
    """Windows keep their side and their tables bit for bit."""
    ours = copy.deepcopy(model)
    plan = timm_resize.resize_(ours, 320)
    assert {c.key for c in plan.tensors} == {"pos_embed", "blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"}
    assert torch.equal(ours.blocks[0].attn.rel_pos_h, model.blocks[0].attn.rel_pos_h)


@pytest.mark.parametrize("options", [{"window_size": 20}, {"window_policy": "scale"}])
@pytest.mark.parametrize("size", [320, (320, 448), (448, 320)])
def test_windows_change_on_request_as_in_a_stock_build(model, size, options):
    """224 to 320 with windows of 20, given or scaled, equals a stock build; the shorter side decides."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, size, **options)
    want = stock("samvit_base_patch16_224", use_abs_pos=True, img_size=size, window_size=20, **TINY)
    assert_same_structure(ours, want)
    rebuilt = stock("samvit_base_patch16_224", **ours._model_args)
    rebuilt.load_state_dict(ours.state_dict())


def test_windows_must_be_square(model):
    """Stock's partition has one side for both axes."""
    with pytest.raises(timm_resize.ResizeError, match=r"window_size=\(14, 7\) is not square"):
        timm_resize.plan_resize(model, 320, window_size=(14, 7))


def test_rotary_caches_follow_the_map_and_the_window():
    """With use_rope the global blocks' cache is that of a stock build at the size, the windows' cache unchanged."""
    kwargs = {**TINY, "use_rope": True, "use_rel_pos": False}
    ours = stock("samvit_base_patch16_224", **kwargs)
    timm_resize.resize_(ours, (256, 320))
    assert_same_structure(ours, stock("samvit_base_patch16_224", img_size=(256, 320), **kwargs))
    with torch.inference_mode():
        assert ours(image((256, 320))).isfinite().all()


def test_patch_size_changes_with_the_grid_kept(model):
    """448 pixels in patches of 32 are 14x14 again: only the projection is resampled."""
    ours = copy.deepcopy(model)
    plan = timm_resize.resize_(ours, 448, patch_size=32)
    assert [c.key for c in plan.tensors] == ["patch_embed.proj.weight"]
    assert_same_structure(ours, stock("samvit_base_patch16_224", use_abs_pos=True, img_size=448, patch_size=32, **TINY))


def test_transposed_images_give_the_same_logits(model):
    """H > W and W > H: with kernels and tables transposed, the transposed image gives the same logits."""
    tall, wide = copy.deepcopy(model), transposed(model, {"rel_pos_h": "rel_pos_w"})
    wide.pos_embed.data = wide.pos_embed.data.transpose(1, 2).contiguous()
    timm_resize.resize_(tall, (320, 176))
    timm_resize.resize_(wide, (176, 320))
    with torch.inference_mode():
        x = image((320, 176))
        torch.testing.assert_close(tall(x), wide(x.transpose(-1, -2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [230, 250, 8])
def test_partial_patches_are_refused(model, size):
    """Stock's forward checks that patches divide the image."""
    with pytest.raises(timm_resize.InvalidSizeError, match="patch_size=16"):
        timm_resize.plan_resize(model, size)


def test_features_equal_those_of_a_stock_feature_model_at_the_size():
    """features_only: same maps as stock's wrapper at the new size with these weights."""
    kwargs = {"features_only": True, "out_indices": (0, 1), "use_abs_pos": True}
    kwargs |= {k: v for k, v in TINY.items() if k != "num_classes"}
    ours = redraw_(stock("samvit_base_patch16_224", **kwargs))
    timm_resize.resize_(ours, (160, 288))
    theirs = stock("samvit_base_patch16_224", img_size=(160, 288), **kwargs)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        x = image((160, 288))
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b)
