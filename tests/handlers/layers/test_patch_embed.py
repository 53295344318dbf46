"""Patch embeddings: what forward makes of sizes that are no multiple of the patch."""

from __future__ import annotations

import pytest
import torch

import timm_resize
from tests.helpers.oracle import image, stock

TINY = {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 1}


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
