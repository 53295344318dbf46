"""Windows that are not square: a table of so many rows is read as what it is, or not at all."""

from __future__ import annotations

import pytest
import torch

import timm_resize
from tests.helpers.oracle import redraw_, stock
from timm_resize.resample import rel_pos_table
from timm_resize.weights.source import windows_of

NAME, ARGS = "swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1), "num_classes": 1}
TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(("size", "window"), [((236, 185), (7, 5)), ((185, 236), (5, 7))])
def test_with_its_size(size, window):
    """Resized in place the windows are scaled, and 9 by 13 offsets are as many as 13 by 9; the size tells which."""
    saved, into = redraw_(stock(NAME, **ARGS)), stock(NAME, img_size=176, **ARGS)
    table = saved.get_parameter(TABLE).detach().clone()
    timm_resize.resize_(saved, size)
    assert saved.layers[0].blocks[0].window_size == window
    table = rel_pos_table((7, 7), window)(table)
    want = rel_pos_table(window, (7, 7))(table)
    got = timm_resize.resize_state_dict(saved.state_dict(), into, source=size)
    assert torch.equal(got[TABLE], want)
    with pytest.raises(timm_resize.CheckpointError, match=r"Give source=\(height, width\)"):
        timm_resize.resize_state_dict(saved.state_dict(), into)


@pytest.mark.parametrize(
    ("offsets", "size", "window"),
    [
        (13 * 13, (224, 224), (7, 7)),
        (23 * 23, (320, 448), (12, 12)),  # of a constructor
        (9 * 13, (224, 224), None),  # 5x7 or 7x5
        (5 * 13, (96, 224), (3, 7)),
        (13 * 5, (224, 96), (7, 3)),
        (9 * 11, (224, 224), None),
        (7, (224, 224), None),
    ],
)
def test_by_number_of_offsets(offsets, size, window):
    """Square ones, and those that are one share of a grid of 4-pixel cells on both sides, rounded down."""
    model = stock(NAME, img_size=512, window_size=16, device="meta", **ARGS)
    found = windows_of({TABLE: torch.empty(offsets, 1, device="meta")}, model, size)
    assert found == (None if window is None else (window,))


def test_a_pretrained_build_of_an_unknown_size(tmp_path):
    """What stock's filter cannot read is a CheckpointError, which says to give the size; given, it loads."""
    saved = redraw_(stock(NAME, **ARGS))
    timm_resize.resize_(saved, (236, 184))
    overlay = {"state_dict": saved.state_dict(), "num_classes": 1}
    with pytest.raises(timm_resize.CheckpointError, match=r"source_size=\(height, width\)"):
        timm_resize.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, img_size=176, **ARGS)
    built = timm_resize.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, img_size=176, source_size=(236, 184), **ARGS
    )
    want = rel_pos_table((7, 5), (7, 7))(saved.get_parameter(TABLE).detach())
    assert torch.equal(built.get_parameter(TABLE), want)
