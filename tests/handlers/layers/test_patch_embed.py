"""Patch embeddings: what forward makes of sizes that are no multiple of the patch."""

from __future__ import annotations

import pytest
import torch

import timm_resize
from tests.helpers.oracle import image, stock

TINY = {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 1}


@torch.no_grad()
def test_a_patch_that_shrinks():
    """By the adjoint, on images of small patches a model does what it did on these enlarged; a plan says the price."""
    model = stock("vit_tiny_patch16_224", class_token=False, global_pool="avg", **TINY)
    plan = timm_resize.plan_resize(model, 32, patch_size=8)
    assert [note for note in plan.notes if "patch_resample='adjoint'" in note]
    assert not timm_resize.plan_resize(model, 56, patch_size=14).notes
    x = torch.rand(2, 3, 32, 32)
    tiles = x.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(32, 3, 8, 8)
    large = torch.nn.functional.interpolate(tiles, (16, 16), mode="bicubic", antialias=True)
    large = large.reshape(2, 4, 4, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)
    want = model(large)
    made = timm_resize.resize_(model, 32, patch_size=8, patch_resample="adjoint")
    assert not made.notes
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [72, (64, 72), (72, 64)])
def test_images_that_forward_pads(size):
    """Padded to whole patches there is a row too many for stored positions; sampled in each forward they do."""
    hw = (size, size) if isinstance(size, int) else size
    stored = stock("vit_tiny_patch16_224", dynamic_img_pad=True, **TINY)
    with pytest.raises(timm_resize.InvalidSizeError, match=r"is padded to a \dx\d grid for patch_size=16, while"):
        timm_resize.plan_resize(stored, size)
    with pytest.raises(RuntimeError):
        stock("vit_tiny_patch16_224", dynamic_img_pad=True, **{**TINY, "img_size": size})(image(hw))
    sampled = stock("vit_tiny_patch16_224", dynamic_img_pad=True, dynamic_img_size=True, **TINY)
    theirs = stock("vit_tiny_patch16_224", dynamic_img_pad=True, dynamic_img_size=True, **TINY)
    theirs.load_state_dict(sampled.state_dict())
    theirs.set_input_size(hw)
    with pytest.warns(UserWarning, match="as in stock, each forward resamples again"):
        timm_resize.resize_(sampled, size)
    with torch.no_grad():
        torch.testing.assert_close(sampled(image(hw)), theirs(image(hw)))
