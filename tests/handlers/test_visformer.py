"""Visformer: three maps of positions, NCHW; the stem rounds up, the patch embeddings down."""

from __future__ import annotations

import pytest
import torch

import timm_resize
from tests.helpers.oracle import image, stock
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

NAME, SMALL = "visformer_tiny", {"depth": (1, 1, 1), "embed_dim": 96, "num_classes": 3}
MAPS = ["pos_embed1", "pos_embed2", "pos_embed3"]


@pytest.mark.parametrize("size", [*ODD, 31, 237, 223, (239, 224)])
def test_a_size_works_or_the_error_names_sizes_that_do(model, size):
    """Decided by what forward can do, also for feature maps."""
    assert_runs_or_names_sizes_that_run(model, size)


@pytest.mark.filterwarnings("ignore:.*drops")
@pytest.mark.parametrize("size", [237, 239, 223, (225, 256)])
def test_odd_sizes_run_where_stock_fails(model, size):
    """Stock's constructor floors the stem's map; ours takes the map that the stem makes, and warns of it."""
    with pytest.raises(AssertionError, match="doesn't match model"):
        stock(NAME, img_size=size, **SMALL)(image(pair(size)))
    with pytest.warns(UserWarning, match="needs timm_resize"):
        timm_resize.resize_(model, size)
    assert model(image(pair(size))).isfinite().all()
    with pytest.warns(UserWarning, match="needs timm_resize"):
        built = timm_resize.create_model(NAME, img_size=size, **SMALL).eval()
    assert built(image(pair(size))).isfinite().all()
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_nearest_sizes_leave_out_nothing_and_reload_in_stock(model):
    """250 leaves 26 rows out; the whole cells around it are multiples of 32, not 255, though that would run."""
    assert timm_resize.nearest_sizes(model, 250) == [(256, 256), (224, 224)]


@pytest.mark.parametrize("size", [384, 230, 250, (320, 192), (192, 250)])
def test_structure_equals_a_fresh_stock_build(size):
    """Shapes, buffers and attributes as stock's constructor makes them, also where pixels are left out."""
    assert_as_built(NAME, size, **SMALL)


@pytest.mark.parametrize("variant", [{"vit_stem": True}, {"init_channels": None}, {"use_pos_embed": False}])
def test_other_stems_follow_too(variant):
    """One patch embedding for all stages, no stem, no position embedding: as stock builds them."""
    assert_as_built(NAME, (256, 192), **{**SMALL, **variant})


@pytest.mark.parametrize("size", [(320, 192), (192, 448)])
def test_smooth_position_maps_are_read_back(model, size):
    """A smooth function of the place in the image, sampled at each stage's cells, is that at the new cells."""
    with torch.no_grad():
        for name in MAPS:
            table = getattr(model, name)
            table.copy_(wave(table.shape[2:]).expand_as(table))
    timm_resize.resize_(model, size)
    for name, cell in zip(MAPS, (8, 16, 32), strict=True):
        grid, table = (size[0] // cell, size[1] // cell), getattr(model, name)
        assert table.shape[2:] == grid
        tolerance = 0.03 if cell < 32 else 0.12  # seven cells per wave are few
        torch.testing.assert_close(table[0, 0].detach(), wave(grid), atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", [(320, 192), (192, 320)])
def test_height_and_width_are_treated_alike(model, size):
    """The transposed model gives the same logits for the transposed image."""
    turned = transposed(model)
    with torch.no_grad():
        for name in MAPS:
            getattr(turned, name).copy_(getattr(model, name).transpose(-1, -2))
    assert_transposes(model, turned, size)


@pytest.mark.parametrize("out_indices", [(0,), (0, 1), (0, 1, 2)])
def test_features_equal_those_of_a_stock_feature_model(out_indices):
    """features_only, also where the later stages are pruned away."""
    assert_features_as_stock(NAME, (192, 288), out_indices=out_indices, **SMALL)


def test_a_pruned_feature_model_takes_sizes_that_its_stages_can():
    """Stage 1 alone runs from one cell of 8 pixels on."""
    model = resized(stock(NAME, features_only=True, out_indices=(0,), **SMALL), 16)
    assert model(image((16, 16)))[0].shape[-2:] == (2, 2)
