"""ConViT: relative positions for the true grid, which stock only knows for squares."""

from __future__ import annotations

import pytest
import torch
from timm.models.convit import GPSA

import timm_resize
from tests.helpers.oracle import image, stock
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
from timm_resize.handlers.convit import relative_positions

NAME, SMALL = "convit_tiny", {"depth": 2, "local_up_to_layer": 1, "num_classes": 3}
CPU = torch.device("cpu")


def indices(model) -> torch.Tensor:
    """Return the first block's relative positions."""
    return model.blocks[0].attn.rel_indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_relative_positions_of_a_square_equal_stock_bit_for_bit(dtype):
    """Stock's own rule, in its dtype."""
    attn = GPSA(8, num_heads=2).to(dtype)
    assert torch.equal(relative_positions((5, 5), device=CPU, dtype=dtype), attn.get_rel_indices(25))


@pytest.mark.parametrize("grid", [(2, 3), (8, 18), (1, 4)])
def test_relative_positions_of_a_wide_grid_are_a_part_of_stocks_square(grid):
    """The first h rows of a w x w square of patches are an h x w grid, row-major, so their pairs are ours."""
    h, w = grid
    square = GPSA(8, num_heads=2).get_rel_indices(w * w)
    assert torch.equal(relative_positions(grid, device=CPU, dtype=torch.float32), square[:, : h * w, : h * w])


def test_relative_positions_of_a_tall_grid_by_hand():
    """Three patches above each other: dx = 0, dy from row to column, and its square."""
    dy = torch.tensor([[0.0, 1, 2], [-1, 0, 1], [-2, -1, 0]])
    want = torch.stack([torch.zeros(3, 3), dy, dy**2], -1)[None]
    assert torch.equal(relative_positions((3, 1), device=CPU, dtype=torch.float32), want)


@pytest.mark.parametrize("size", [(128, 288), (288, 128), (320, 192)])
def test_forward_reads_the_positions_that_a_resize_made(model, size):
    """Forward rebuilds only where the number of tokens differs, so the buffer for the true grid stays."""
    timm_resize.resize_(model, size)
    made = indices(model)
    with torch.inference_mode():
        model(image(size))
    assert indices(model) is made
    grid = (size[0] // 16, size[1] // 16)
    assert torch.equal(made, relative_positions(grid, device=CPU, dtype=torch.float32))


def test_stock_is_silently_wrong_where_the_patches_could_make_a_square():
    """8x18 patches: stock lays them out as 12x12 and runs. Built through us, the positions are of 8x18."""
    theirs = stock(NAME, img_size=(128, 288), **SMALL)
    theirs(image((128, 288)))
    assert torch.equal(indices(theirs), relative_positions((12, 12), device=CPU, dtype=torch.float32))
    ours = timm_resize.create_model(NAME, img_size=(128, 288), **SMALL).eval()
    ours(image((128, 288)))
    assert torch.equal(indices(ours), relative_positions((8, 18), device=CPU, dtype=torch.float32))


def test_grids_of_as_many_patches_are_not_confused(model):
    """12x12, 8x18 and 18x8 all have 144 patches; each gets its own positions, in any order."""
    for size in ((192, 192), (128, 288), (288, 128), (192, 192)):
        timm_resize.resize_(model, size)
        with torch.inference_mode():
            model(image(size))
        grid = (size[0] // 16, size[1] // 16)
        assert torch.equal(indices(model), relative_positions(grid, device=CPU, dtype=torch.float32))


def test_a_square_model_as_stock_builds_it_needs_nothing():
    """Stock's placeholder, which its first forward fills, is right for squares."""
    model = stock(NAME, img_size=256, **SMALL)
    assert not timm_resize.plan_resize(model, 256)
    assert not [c for c in timm_resize.plan_resize(model, 384) if c.kind == "buffer"]


def test_positions_take_the_weights_dtype(model):
    """A half-precision model gets half-precision positions."""
    timm_resize.resize_(model.to(torch.bfloat16), (192, 256))
    assert indices(model).dtype is torch.bfloat16


@pytest.mark.parametrize("size", ODD)
def test_a_size_works_or_the_error_names_sizes_that_do(model, size):
    """Decided by what forward can do, also for feature maps and grids that are not square."""
    assert_runs_or_names_sizes_that_run(model, size)


@pytest.mark.parametrize("size", [384, 230, 239])
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
    torch.testing.assert_close(model.pos_embed[0, :, 0].reshape(grid).detach(), wave(grid), atol=0.03, rtol=0)


@pytest.mark.parametrize("size", [(320, 192), (192, 320), (128, 288)])
def test_height_and_width_are_treated_alike(model, size):
    """The transposed model, reading dy for dx, gives the same logits for the transposed image."""
    turned = transposed(model)
    turned.pos_embed.data = transposed_table(turned.pos_embed, (14, 14))
    proj = turned.blocks[0].attn.pos_proj.weight
    proj.data = proj.data[:, [1, 0, 2]].clone()
    assert_transposes(model, turned, size)


def test_features_equal_those_of_a_stock_feature_model():
    """features_only, at a square size, the only ones that stock can run."""
    assert_features_as_stock(NAME, (288, 288), **{**SMALL, "depth": 3})
