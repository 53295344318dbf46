"""Sampling at given positions, against torch's interpolate where that can express them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from timm_resize.resample.sampling import sample_matrix


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (7, 7), (31, 10), (3, 8)])
def test_at_half_pixel_positions_it_is_interpolate(old, new, mode, antialias):
    """(i + 1/2) * old / new - 1/2 are the positions of torch's interpolate, borders and both cubic kernels included."""
    scale = old / new
    positions = (torch.arange(new, dtype=torch.float64) + 0.5) * scale - 0.5
    x = torch.randn(1, 1, 1, old, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = F.interpolate(x, size=(1, new), mode=mode, antialias=antialias, align_corners=False)[0, 0, 0]
    got = sample_matrix(positions, old, spacing=scale, mode=mode, antialias=antialias) @ x[0, 0, 0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("antialias", [True, False])
def test_whole_positions_read_the_samples_and_rows_sum_to_one(mode, antialias):
    """A sample is read where it lies, and a constant stays one at any position, beyond the border too."""
    at_samples = sample_matrix(torch.arange(5, dtype=torch.float64), 5, mode=mode, antialias=antialias)
    torch.testing.assert_close(at_samples, torch.eye(5, dtype=torch.float64))
    anywhere = torch.tensor([-0.7, 0.3, 2.5, 4.6], dtype=torch.float64)
    rows = sample_matrix(anywhere, 5, mode=mode, antialias=antialias)
    torch.testing.assert_close(rows.sum(1), torch.ones(4, dtype=torch.float64))
