"""PiT: positions at the centres of overlapping patches."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import timm_resize
from tests.helpers.oracle import image, redraw_, stock
from tests.helpers.transposed import transposed
from timm_resize.handlers.pit import PatchCentre

SMALL = {"depth": (1, 1, 1), "num_classes": 3}


@pytest.fixture(scope="module")
def model():
    """A redrawn small pit_ti at 224: patches of 16 at every 8 pixels, 27x27."""
    return redraw_(stock("pit_ti_224", **SMALL))


def places(side: int, patch: int, stride: int) -> torch.Tensor:
    """Return the centres of all patches that fit, as shares of the image."""
    return torch.tensor([(start + patch / 2) / side for start in range(0, side - patch + 1, stride)])


def axis(old_side: int, new_side: int, patch: int = 16, stride: int = 8, **options) -> PatchCentre:
    old, new = (len(places(side, patch, stride)) for side in (old_side, new_side))
    return PatchCentre(old, new, old_side, new_side, patch / 2 / stride, **options)


@pytest.mark.parametrize(("patch", "stride"), [(16, 8), (14, 7), (16, 16), (16, 12)])
@pytest.mark.parametrize("new_side", [384, 160, 230, 225])
def test_a_smooth_function_of_the_place_is_read_back(patch, stride, new_side):
    """Samples of f at the patch centres of 224 pixels become samples of f at those of the new image."""

    def f(place: torch.Tensor) -> torch.Tensor:
        return torch.cos(math.pi * place) + 0.5 * place

    how = axis(224, new_side, patch, stride)
    got = how.matrix().float() @ f(places(224, patch, stride))
    torch.testing.assert_close(got, f(places(new_side, patch, stride)), atol=0.05, rtol=0)
    inner = slice(2, -2)  # away from the border, where the kernel is whole, far closer
    torch.testing.assert_close(got[inner], f(places(new_side, patch, stride))[inner], atol=0.006, rtol=0)


@pytest.mark.parametrize("side", [384, 128])
@pytest.mark.parametrize("antialias", [True, False])
def test_without_overlap_it_is_torch_interpolate(side, antialias):
    """Patches of 16 at every 16 pixels: the half-pixel geometry of torch, both cubic kernels."""
    table = torch.randn(1, 1, 1, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = F.interpolate(table, size=(1, side // 16), mode="bicubic", antialias=antialias)[0, 0, 0]
    got = axis(224, side, 16, 16, antialias=antialias).matrix() @ table[0, 0, 0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_geometry_differs_from_half_pixel_sampling_where_patches_overlap():
    """By hand: 224 to 448 pixels, patch 1 is centred at 16, where patch 0 was at 8; patch 2 halfway to the next."""
    row = axis(224, 448, mode="bilinear", antialias=False).matrix()
    assert row.shape == (55, 27)
    torch.testing.assert_close(row[1] @ torch.arange(27.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(row[2] @ torch.arange(27.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))


def test_same_grid_of_another_image_is_resampled_and_the_way_back_is_exact(model):
    """224 and 230 pixels both give 27x27 patches, which lie at other shares of the image."""
    ours = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="drops 6 rows and 6 columns"):
        plan = timm_resize.resize_(ours, 230)
    assert [c.key for c in plan.tensors] == ["pos_embed"]
    assert ours.pos_embed.shape == model.pos_embed.shape
    assert not torch.equal(ours.pos_embed, model.pos_embed)
    timm_resize.resize_(ours, 224)
    assert torch.equal(ours.pos_embed, model.pos_embed)


@pytest.mark.parametrize("size", [12, (8, 224)])
def test_images_below_one_patch_are_refused(model, size):
    """Nothing smaller than a patch has a token."""
    with pytest.raises(timm_resize.InvalidSizeError, match="smaller than patch_size=16"):
        timm_resize.plan_resize(model, size)


def test_transposed_images_give_the_same_logits(model):
    """H > W and W > H: with kernels and table transposed, the transposed image gives the same logits."""
    tall, wide = copy.deepcopy(model), transposed(model)
    wide.pos_embed.data = wide.pos_embed.data.transpose(2, 3).contiguous()
    timm_resize.resize_(tall, (320, 176))
    timm_resize.resize_(wide, (176, 320))
    with torch.inference_mode():
        x = image((320, 176))
        torch.testing.assert_close(tall(x), wide(x.transpose(-1, -2)), atol=1e-4, rtol=1e-4)


def test_features_equal_those_of_a_stock_feature_model_at_the_size():
    """features_only wraps the whole model with hooks: same maps as stock's at the new size with these weights."""
    ours = redraw_(stock("pit_ti_224", features_only=True, depth=(1, 1, 1)))
    timm_resize.resize_(ours, (160, 288))
    theirs = stock("pit_ti_224", features_only=True, depth=(1, 1, 1), img_size=(160, 288))
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        x = image((160, 288))
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b)
