"""CoaT and CoaT-Lite: grids of four patch embeddings, and the sizes that the parallel blocks can add up."""

from __future__ import annotations

import copy

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
    resized,
)
from tests.helpers.transposed import transposed

COAT = ("coat_tiny", {"embed_dims": [32] * 4, "serial_depths": [1] * 4, "parallel_depth": 1, "num_classes": 3})
LITE = ("coat_lite_tiny", {"embed_dims": [16, 32, 32, 64], "serial_depths": [1] * 4, "num_classes": 3})


@pytest.fixture(scope="module", params=[COAT, LITE], ids=["coat", "lite"])
def base(request):
    """A redrawn small model at 224."""
    return redraw_(stock(request.param[0], **request.param[1]))


@pytest.mark.parametrize("size", [*ODD, 31, 48, (230, 257)])
def test_a_size_works_or_the_error_names_sizes_that_do(model, size):
    """Decided by what forward can do, also for feature maps."""
    assert_runs_or_names_sizes_that_run(model, size)


@pytest.mark.parametrize("size", [240, 250, 272, 48])
def test_stock_coat_fails_inside_forward_where_ours_refuses(size):
    """Stage 2's grid must be four times stage 4's: stock builds the rest and breaks on an addition."""
    name, small = COAT
    with pytest.raises(RuntimeError, match="must match"):
        stock(name, img_size=size, **small)(image((size, size)))
    with pytest.raises(timm_resize.InvalidSizeError, match="which the parallel blocks need"):
        timm_resize.resize_(stock(name, **small), size)


def test_pixels_left_out_are_counted():
    """230: CoaT's stage 4 is 7x7 cells of 32, the rest, 6 pixels, are left out; 224 leaves nothing out."""
    model = stock(COAT[0], **COAT[1])
    with pytest.warns(UserWarning, match="drops 6 rows and 6 columns .* the cells of stage 4 take 32x32"):
        timm_resize.resize_(model, 230)
    assert timm_resize.nearest_sizes(model, 230) == [(224, 224), (256, 256)]


@pytest.mark.parametrize("size", [256, 230, (256, 320), (257, 192)])
@pytest.mark.parametrize(("name", "small"), [COAT, LITE])
def test_structure_equals_a_fresh_stock_build(name, small, size):
    """Shapes, buffers and attributes as stock's constructor makes them, also where pixels are left out."""
    assert_as_built(name, size, **small)


@pytest.mark.parametrize("size", [(256, 320), (230, 192)])
def test_the_same_logits_as_a_stock_build_with_these_weights(base, size):
    """Nothing but the recorded sizes changes, so stock's model at the size, given the weights, is the same model."""
    ours = resized(copy.deepcopy(base), size)
    name, small = COAT if base.parallel_blocks is not None else LITE
    theirs = stock(name, img_size=size, **small)
    theirs.load_state_dict(base.state_dict())
    with torch.inference_mode():
        assert torch.equal(ours(image(size)), theirs(image(size)))


@pytest.mark.parametrize("size", [(256, 160), (160, 256)])
def test_height_and_width_are_treated_alike(model, size):
    """The transposed model gives the same logits for the transposed image."""
    assert_transposes(model, transposed(model), size)


@pytest.mark.parametrize("out_indices", [(0,), (0, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize(("name", "small"), [COAT, LITE])
def test_features_equal_those_of_a_stock_feature_model(name, small, out_indices):
    """features_only, also where the later stages are pruned away."""
    assert_features_as_stock(name, (256, 160), out_indices=out_indices, **small)


def test_a_pruned_feature_model_takes_sizes_that_its_stages_can():
    """With stage 1 alone, 240 is 60 patches of 4: nothing has to add up."""
    name, small = COAT
    model = stock(name, features_only=True, out_indices=(0,), **small)
    timm_resize.resize_(model, 240)
    assert model(image((240, 240)))[0].shape[-2:] == (60, 60)
