"""VOLO: one map of positions, NHWC, at the transformer stages; the stem rounds up, what follows down."""

from __future__ import annotations

import pytest
import torch

import timm_resize
from tests.helpers.oracle import image, redraw_, stock
from tests.helpers.sizes import (
    ODD,
    assert_as_built,
    assert_features_as_stock,
    assert_runs_or_names_sizes_that_run,
    assert_transposes,
    pair,
    resized,
    wave,
)
from tests.helpers.transposed import transposed

NAME, SMALL = "volo_d1_224", {"mlp_ratio": 0.25, "stem_hidden_dim": 8, "num_classes": 3}


@pytest.fixture(scope="module")
def base():
    """A redrawn VOLO at 224, of one block per stage."""
    model = redraw_(stock(NAME, **SMALL))
    for stage in (0, 2, 3, 4):  # its entry points do not let `layers` be given
        model.network[stage] = model.network[stage][:1]
    return model


@pytest.mark.parametrize("size", [*ODD, 15, 237, (239, 224)])
def test_a_size_works_or_the_error_names_sizes_that_do(model, size):
    """Decided by what forward can do, also for feature maps."""
    assert_runs_or_names_sizes_that_run(model, size)


@pytest.mark.parametrize("size", [239, (239, 224), (224, 255)])
def test_sizes_just_below_a_cell_run_where_stock_fails(model, size):
    """Stock's constructor floors to one cell less than forward makes; ours takes forward's, and warns."""
    with pytest.raises(RuntimeError, match="must match"):
        stock(NAME, img_size=size, **SMALL)(image(pair(size)))
    with pytest.warns(UserWarning, match="needs timm_resize"):
        timm_resize.resize_(model, size)
    assert model.pos_embed.shape[1:3] == tuple(-(-side // 16) for side in pair(size))
    assert model(image(pair(size))).isfinite().all()


def test_a_created_model_repairs_stocks_constructor():
    """create_model at 239 without weights: stock's 14x14 map becomes the 15x15 that forward adds it to."""
    with pytest.warns(UserWarning, match="needs timm_resize"):
        model = timm_resize.create_model(NAME, img_size=239, **SMALL).eval()
    assert model.pos_embed.shape[1:3] == (15, 15)
    assert model(image((239, 239))).isfinite().all()


def test_nearest_sizes_leave_out_nothing_and_reload_in_stock(model):
    """Multiples of 16, not 239 or 255, which would run but which stock's constructor cannot build."""
    assert timm_resize.nearest_sizes(model, 239) == [(240, 240), (224, 224)]


@pytest.mark.parametrize("size", [384, 230, 250, (320, 192)])
def test_structure_equals_a_fresh_stock_build(size):
    """Shapes, buffers and attributes as stock's constructor makes them, also where pixels are left out."""
    assert_as_built(NAME, size, **SMALL)


@pytest.mark.parametrize("size", [(320, 192), (192, 448)])
def test_a_smooth_position_map_is_read_back(model, size):
    """A smooth function of the place in the image, sampled per cell, is that function at the new cells."""
    with torch.no_grad():
        model.pos_embed.copy_(wave((14, 14))[None, :, :, None].expand_as(model.pos_embed))
    timm_resize.resize_(model, size)
    grid = (size[0] // 16, size[1] // 16)
    torch.testing.assert_close(model.pos_embed[0, :, :, 0].detach(), wave(grid), atol=0.03, rtol=0)


@pytest.mark.parametrize("size", [(320, 192), (192, 320)])
def test_height_and_width_are_treated_alike(model, size):
    """The transposed model gives the same logits for the transposed image."""
    turned = transposed(model)
    with torch.no_grad():
        turned.pos_embed.copy_(model.pos_embed.transpose(1, 2))
        for block in turned.network[0]:
            attn = block.attn.attn  # (heads * 9 * 9, dim): from each of 3x3 places to each of 3x3
            for tensor in (attn.weight, attn.bias):
                places = tensor.reshape(-1, 3, 3, 3, 3, *tensor.shape[1:])
                tensor.copy_(places.transpose(1, 2).transpose(3, 4).reshape(tensor.shape).clone())
    assert_transposes(model, turned, size)


@pytest.mark.parametrize("out_indices", [(0,), (0, 1, 2, 3)])
def test_features_equal_those_of_a_stock_feature_model(out_indices):
    """features_only, also with the outlookers alone, which have no positions."""
    assert_features_as_stock(NAME, (160, 224), out_indices=out_indices, **SMALL)


def test_a_model_without_positions_left_takes_any_size_its_strides_can():
    """Pruned to the outlookers, 250 pixels are 125 // 4 = 31 cells."""
    model = resized(stock(NAME, features_only=True, out_indices=(0,), **SMALL), 250)
    assert model(image((250, 250)))[0].shape[-2:] == (31, 31)
