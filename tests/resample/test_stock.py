"""The resamplings against stock timm's own functions, and where torch's interpolate is wrong."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed_nhwc
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

from tests.helpers.resampling import GRIDS, KERNELS, close, draw, one_axis, ramp
from timm_resize.resample import Interpolate, Resample, patch_kernel, pos_embed, pos_embed_map, rel_pos_table


@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_pos_embed_equals_stock(old, new, prefix):
    """timm's resample_abs_pos_embed to 1e-5, each kernel; the prefix bit for bit."""
    table = draw(1, prefix + old[0] * old[1], 6)
    for mode, antialias in KERNELS:
        ours = pos_embed(old, new, prefix=prefix, mode=mode, antialias=antialias)(table)
        theirs = resample_abs_pos_embed(table, new, old, prefix, interpolation=mode, antialias=antialias)
        close(ours, theirs)
        assert torch.equal(ours[:, :prefix], table[:, :prefix])
    corners = pos_embed(old, new, prefix=prefix, mode="bilinear", align_corners=True)(table)
    close(corners, resample_abs_pos_embed(table, new, old, prefix, "bilinear", False, align_corners=True))


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_pos_embed_map_equals_stock(old, new):
    """timm's resample_abs_pos_embed_nhwc to 1e-5, and the same numbers for the NCHW layout."""
    table = draw(1, *old, 6)
    ours = pos_embed_map(old, new, dim=1)(table)
    close(ours, resample_abs_pos_embed_nhwc(table, new))
    channels_first = pos_embed_map(old, new, dim=2)(table.permute(0, 3, 1, 2))
    close(channels_first, ours.permute(0, 3, 1, 2), 1e-7)


@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize("suffix", [0, 3])
def test_rel_pos_table_equals_stock(old, new, suffix):
    """timm's resize_rel_pos_bias_table to 1e-5 at every window, flat with and without class-token rows."""
    count, wanted = ((2 * h - 1) * (2 * w - 1) + suffix for h, w in (old, new))
    table = draw(count, 4)
    ours = rel_pos_table(old, new, suffix=suffix)(table)
    close(ours, resize_rel_pos_bias_table(table, new, (wanted, 4), old_window_size=old))
    assert torch.equal(ours[wanted - suffix :], table[count - suffix :])


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_rel_pos_table_tf_equals_stock(old, new):
    """The unflattened layout (heads, 2h-1, 2w-1) too."""
    table = draw(4, 2 * old[0] - 1, 2 * old[1] - 1)
    shape = (4, 2 * new[0] - 1, 2 * new[1] - 1)
    close(rel_pos_table(old, new, dim=1, flat=False)(table), resize_rel_pos_bias_table(table, new, shape))


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_patch_kernel_equals_stock(old, new):
    """timm's resample_patch_embed to 1e-5, growing and shrinking, each axis on its own."""
    kernel = draw(5, 3, *old)
    close(patch_kernel(old, new)(kernel), resample_patch_embed(kernel, new))


@pytest.mark.parametrize("old", [(1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("new", [(1, 9), (5, 1), (4, 4), (1, 1)])
def test_sides_of_one(old, new):
    """A side of 1 beside any other: equal to resizing each axis alone, as a part of a wider image."""
    table = draw(1, old[0] * old[1], 3, dtype=torch.float64)
    for mode, antialias in KERNELS:
        rows, columns = (one_axis(a, b, mode, antialias) for a, b in zip(old, new, strict=True))
        want = torch.einsum("yh,xw,hwc->yxc", rows, columns, table.reshape(*old, 3)).reshape(1, -1, 3)
        close(pos_embed(old, new, mode=mode, antialias=antialias)(table), want)


def test_sides_of_one_in_closed_form():
    """A ramp of 7 rows and one column, 7→4: each output is its own kernel's mean, not the first sample's."""
    centre = (ramp(4) + 0.5) * 7 / 4 - 0.5
    distance = (ramp(7) - centre[:, None]).abs() / (7 / 4)
    triangle = (1 - distance).clamp(min=0)
    want = (triangle / triangle.sum(1, keepdim=True)) @ ramp(7)
    close(pos_embed((7, 1), (4, 1), mode="bilinear")(ramp(7).reshape(1, 7, 1)).flatten(), want)


def test_one_axis_corner_to_corner():
    """Offsets -3..3 onto -6..6 hit every old offset exactly and the midpoints between."""
    table = draw(7, 3)
    out = Resample((Interpolate(7, 13, "bilinear", False, True),))(table)
    close(out[::2], table, 1e-6)
    close(out[1::2], (table[1:] + table[:-1]) / 2, 1e-6)
