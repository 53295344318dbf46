"""TNT and its legacy kind: a class token, then a position per patch; inside a patch nothing depends on the size."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.tnt import checkpoint_filter_fn

import timm_resize
from tests.helpers.oracle import image, redraw_, stock
from tests.helpers.sizes import (
    ODD,
    assert_as_built,
    assert_features_as_stock,
    assert_runs_or_names_sizes_that_run,
    assert_transposes,
    resized,
    transposed_table,
    wave,
)
from tests.helpers.transposed import transposed

NAMES = ["tnt_s_patch16_224", "tnt_s_legacy_patch16_224"]
SMALL = {"depth": 1, "embed_dim": 96, "inner_dim": 8, "num_classes": 3}


@pytest.fixture(scope="module", params=NAMES)
def base(request):
    """A redrawn small TNT at 224."""
    return redraw_(stock(request.param, **SMALL))


@pytest.mark.parametrize("size", [*ODD, 236, 237, 238, 47, (239, 224)])
def test_a_size_works_or_the_error_names_sizes_that_do(model, size):
    """Decided by what forward can do, also for feature maps."""
    assert_runs_or_names_sizes_that_run(model, size)


@pytest.mark.parametrize("size", [237, 238, 239, (224, 270)])
def test_the_legacy_stem_rounds_up(size):
    """Its strided map has a patch more than stock counts: stock builds it and breaks on a reshape."""
    pair = (size, size) if isinstance(size, int) else size
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        stock(NAMES[1], img_size=size, **SMALL)(image(pair))
    with pytest.raises(timm_resize.InvalidSizeError, match="the legacy stem rounds up"):
        timm_resize.resize_(stock(NAMES[1], **SMALL), size)


@pytest.mark.parametrize("size", [384, 230, 250, (320, 192), (192, 250)])
@pytest.mark.parametrize("name", NAMES)
def test_structure_equals_a_fresh_stock_build(name, size):
    """Shapes, buffers and attributes as stock's constructor makes them, also where pixels are dropped."""
    assert_as_built(name, size, **SMALL)


@pytest.mark.parametrize("size", [384, 160, (320, 192), 230])
def test_values_equal_stocks_own_checkpoint_filter(base, size):
    """Stock resamples `patch_pos` on loading; the same numbers, class token included."""
    name = NAMES[int(base.pixel_embed.legacy)]
    theirs = stock(name, img_size=size, **SMALL)
    want = checkpoint_filter_fn({k: v.clone() for k, v in base.state_dict().items()}, theirs)["patch_pos"]
    got = resized(copy.deepcopy(base), size).patch_pos.detach()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert torch.equal(got[:, 0], base.patch_pos[:, 0].detach())


@pytest.mark.parametrize("size", [(320, 192), (192, 448)])
def test_a_smooth_position_table_is_read_back(model, size):
    """A smooth function of the place in the image, sampled per patch, is that function at the new patches."""
    with torch.no_grad():
        model.patch_pos[0, 1:] = wave((14, 14)).reshape(-1, 1).expand(-1, 96)
    timm_resize.resize_(model, size)
    grid = (size[0] // 16, size[1] // 16)
    torch.testing.assert_close(model.patch_pos[0, 1:, 0].reshape(grid).detach(), wave(grid), atol=0.03, rtol=0)


def exchange_pixels(weight: torch.Tensor) -> torch.Tensor:
    """Exchange rows and columns of the 4x4 pixels in the last dimension, (pixel, inner dim) pixel-major."""
    return weight.reshape(*weight.shape[:-1], 4, 4, -1).transpose(-3, -2).reshape(weight.shape).clone()


@pytest.mark.parametrize("size", [(320, 192), (192, 320)])
def test_height_and_width_are_treated_alike(model, size):
    """The model with patches and the pixels in them transposed gives the same logits for the transposed image."""
    turned = transposed(model)
    with torch.no_grad():
        turned.patch_pos.copy_(transposed_table(turned.patch_pos, (14, 14), prefix=1))
        turned.pixel_pos.copy_(turned.pixel_pos.transpose(-1, -2).clone())
        for part in (turned, *turned.blocks):
            tensors = [part.proj.weight]
            if part.norm1_proj.weight.numel() == part.proj.weight.shape[1]:  # legacy blocks norm each pixel alone
                tensors += [part.norm1_proj.weight, part.norm1_proj.bias]
            for tensor in tensors:
                tensor.copy_(exchange_pixels(tensor))
    assert_transposes(model, turned, size)


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_those_of_a_stock_feature_model(name):
    """features_only, at a size that is not square."""
    assert_features_as_stock(name, (192, 288), **{**SMALL, "depth": 3})
