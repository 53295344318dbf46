"""Whatever map a family takes by itself, the one that the caller asks for is taken everywhere."""

from __future__ import annotations

import warnings

import pytest

import timm_resize
from tests.helpers.examples import ALWAYS, EXAMPLES
from tests.helpers.oracle import stock
from timm_resize.core.find import current_size
from timm_resize.resample import Resample

WITHOUT = {
    "coat_tiny",
    "resnet18",
    "resnet32ts",
    "swinv2_cr_tiny_224",
    "swinv2_tiny_window8_256",
    "vit_relpos_small_patch16_224",
}
"""Examples of families that resample nothing, or whose networks compute their biases."""


@pytest.mark.parametrize("name", sorted(ALWAYS - WITHOUT))
def test_what_is_asked_for_reaches_every_map(name):
    """Two requests that differ in both options: no default agrees with both. Windows scale, so that tables change."""
    model = stock(name, device="meta", **EXAMPLES[name])
    size = timm_resize.nearest_sizes(model, tuple(side + 64 for side in current_size(model)))[0]
    for mode, antialias in (("bilinear", False), ("bicubic", True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = timm_resize.plan_resize(model, size, window_policy="scale", interpolation=mode, antialias=antialias)
        maps = [change.how for change in plan if isinstance(change.how, Resample)]
        axes = [axis for how in maps for axis in (*how.axes, *(how.then.axes if how.then else ()))]
        assert axes
        assert {(axis.mode, axis.antialias) for axis in axes} == {(mode, antialias)}
