"""Hiera: the window part of its position embedding is tiled, the residual interpolated."""

from __future__ import annotations

import math

import pytest
import torch

import timm_resize
from tests.helpers.oracle import image, redraw_, stock
from timm_resize.handlers.hiera import TiledWindow
from timm_resize.resample import pos_embed

SMALL = {"stages": (1, 1, 1, 1), "embed_dim": 16, "num_classes": 3}
GRIDS = [((56, 56), (96, 96)), ((56, 56), (40, 40)), ((56, 56), (72, 48)), ((40, 64), (64, 40))]


def resampled(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Map an (h, w) table of one channel as the handler does."""
    how = TiledWindow(pos_embed(old, new).axes, dim=1, flat=True)
    return how(table.reshape(1, -1, 1)).reshape(new)


def waves(size: tuple[int, int]) -> torch.Tensor:
    """Sample cos + sin of one period per side at cell centres; its mean over the windows is 0 at every cell."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in size)
    return torch.cos(2 * math.pi * y)[:, None] + torch.sin(2 * math.pi * x)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_a_pattern_that_repeats_per_window_is_tiled(old, new):
    """A table that is one 8x8 pattern repeated stays that pattern at every size, bit for bit up to rounding."""
    pattern = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = resampled(pattern.tile(old[0] // 8, old[1] // 8), old, new)
    torch.testing.assert_close(got, pattern.tile(new[0] // 8, new[1] // 8), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_window_pattern_and_smooth_part_are_each_read_back(old, new):
    """Pattern plus a smooth function of position: the pattern is tiled, the function sampled at the new cells."""
    pattern = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = resampled(pattern.tile(old[0] // 8, old[1] // 8) + waves(old), old, new)
    torch.testing.assert_close(got, pattern.tile(new[0] // 8, new[1] // 8) + waves(new), atol=0.03, rtol=0)


def test_as_in_a_model_with_separate_window_and_global_embeddings():
    """A plain table equal to what the abswin variant assembles is resized to what that one assembles there."""
    kwargs = {**SMALL, "abs_win_pos_embed": True, "global_pos_size": (16, 16)}
    embeds = {}
    for size in ((256, 256), (384, 320)):
        model = stock("hiera_tiny_224", img_size=size, **kwargs)
        with torch.no_grad():
            torch.manual_seed(0)
            model.pos_embed_win.normal_()
            model.pos_embed.copy_(waves((16, 16)))
            embeds[size] = model._pos_embed(torch.zeros(1, 1, 16))
    plain = stock("hiera_tiny_224", img_size=256, **SMALL)
    with torch.no_grad():
        plain.pos_embed.copy_(embeds[256, 256])
    timm_resize.resize_(plain, (384, 320))
    torch.testing.assert_close(plain.pos_embed, embeds[384, 320], atol=0.03, rtol=0)


@pytest.mark.parametrize("size", [(192, 320), (320, 192)])
def test_transposing_table_and_size_transposes_the_result(size):
    """Height and width are treated alike."""
    torch.manual_seed(0)
    table = torch.randn(56, 56, dtype=torch.float64)
    new = (size[0] // 4, size[1] // 4)
    got, mirrored = resampled(table, (56, 56), new), resampled(table.T.contiguous(), (56, 56), new[::-1])
    torch.testing.assert_close(got, mirrored.T, atol=1e-12, rtol=0)


def test_second_moments_stay_above_the_squares_of_the_mapped_first_moments():
    """With v = m² before, an Adam step |m| / sqrt(v) is at most 1 after the resize, too; v stays positive."""
    torch.manual_seed(0)
    how = TiledWindow(pos_embed((16, 24), (24, 16)).axes, dim=1, flat=True)
    m = torch.randn(1, 16 * 24, 3, dtype=torch.float64)
    v = how.second_moment(m.square())
    assert v.shape == (1, 24 * 16, 3)
    assert (v > 0).all()
    assert (how(m).square() <= v * (1 + 1e-9)).all()


@pytest.mark.parametrize("size", [230, 240, 250, 272, (250, 224), 16])
def test_partial_mask_units_are_refused_with_sizes_that_run(size):
    """Forward cannot unroll a grid that is not whole units; the sizes named in the error do run."""
    model = stock("hiera_tiny_224", **SMALL)
    with pytest.raises(timm_resize.InvalidSizeError, match="whole mask units of 8x8"):
        timm_resize.resize_(model, size)
    for near in timm_resize.nearest_sizes(model, size):
        timm_resize.resize_(model, near)
        assert model(image(near)).isfinite().all()


@pytest.mark.parametrize("size", [253, (255, 254)])
def test_sizes_that_the_convolution_pads_to_whole_units_run_with_a_warning(size):
    """The patch convolution rounds up: 253 pixels give 64 tokens, which stock's constructor counts as 63."""
    model = stock("hiera_tiny_224", **SMALL)
    with pytest.warns(UserWarning, match="padded to a 64x64 token grid"):
        timm_resize.resize_(model, size)
    size = (size, size) if isinstance(size, int) else size
    assert model(image(size)).isfinite().all()


@pytest.mark.parametrize("name", ["hiera_tiny_224", "hiera_small_abswin_256"])
def test_features_equal_those_of_a_stock_feature_model_at_the_size(name):
    """features_only: resized and then loaded into stock's wrapper at the new size, the feature maps agree."""
    ours = redraw_(stock(name, features_only=True, **SMALL))
    timm_resize.resize_(ours, (192, 288))
    theirs = stock(name, features_only=True, img_size=(192, 288), **SMALL)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        x = image((192, 288))
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b)
