"""CaiT: the position embedding has no prefix; sizes are floored to the patch."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_patch_embed

import timm_resize
from tests.helpers.oracle import image
from tests.helpers.sizes import (
    ODD,
    assert_as_built,
    assert_features_as_stock,
    assert_runs_or_names_sizes_that_run,
    assert_transposes,
    transposed_table,
    wave,
)
from tests.helpers.transposed import transposed

NAME, SMALL = "cait_xxs24_224", {"depth": 2, "depth_token_only": 1, "num_classes": 3}


@pytest.mark.parametrize("size", ODD)
def test_a_size_works_or_the_error_names_sizes_that_do(model, size):
    """Decided by what forward can do, also for feature maps."""
    assert_runs_or_names_sizes_that_run(model, size)


@pytest.mark.parametrize("size", [384, 230, 239, (320, 192), (192, 250)])
def test_structure_equals_a_fresh_stock_build(size):
    """Shapes, buffers and attributes as stock's constructor makes them, also where pixels are dropped."""
    assert_as_built(NAME, size, **SMALL)


@pytest.mark.parametrize("size", [(320, 192), (192, 448)])
def test_a_smooth_position_table_is_read_back(model, size):
    """A smooth function of the place in the image, sampled per patch, is that function at the new patches."""
    with torch.no_grad():
        model.pos_embed.copy_(wave((14, 14)).reshape(1, -1, 1).expand(1, -1, 192))
    timm_resize.resize_(model, size)
    grid = (size[0] // 16, size[1] // 16)
    assert model.pos_embed.shape == (1, grid[0] * grid[1], 192)
    torch.testing.assert_close(model.pos_embed[0, :, 0].reshape(grid).detach(), wave(grid), atol=0.03, rtol=0)


@pytest.mark.parametrize("size", [(320, 192), (192, 320)])
def test_height_and_width_are_treated_alike(model, size):
    """The transposed model gives the same logits for the transposed image."""
    turned = transposed(model)
    turned.pos_embed.data = transposed_table(turned.pos_embed, (14, 14))
    assert_transposes(model, turned, size)


def test_features_equal_those_of_a_stock_feature_model():
    """features_only, at a size that is not square."""
    assert_features_as_stock(NAME, (192, 288), **{**SMALL, "depth": 3})


def test_patch_size_takes_the_projection_and_the_grid_along(model):
    """Patch 16 → 32: the kernel as stock timm's own resampling has it, a 7x7 grid, the reduction of features."""
    want = resample_patch_embed(model.patch_embed.proj.weight.detach().clone(), [32, 32])
    timm_resize.resize_(model, patch_size=32)
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), want, atol=1e-5, rtol=1e-5)
    assert model.pos_embed.shape == (1, 49, 192)
    assert [info["reduction"] for info in model.feature_info] == [32, 32]
    assert model(image((224, 224))).isfinite().all()
