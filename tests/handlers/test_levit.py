"""LeViT at any size: grids rounded up, bias tables over offsets, caches."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from timm.models.levit import Attention, AttentionDownsample
from torch import nn

import timm_resize
from tests.helpers.oracle import assert_close, assert_same_structure, image, redraw_, stock
from timm_resize.handlers.layers.offset_bias import offset_index
from timm_resize.resample import offset_table

TINY = dict(embed_dim=(32, 48, 64), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1), num_classes=3)
NAMES = ["levit_128s", "levit_512", "levit_384_s8", "levit_conv_128s", "levit_conv_384_s8"]
"""Distilled and not, stems of stride 16 and 8, linear layers and convolutions."""


def build(name: str, **kwargs) -> nn.Module:
    return redraw_(stock(name, **{**TINY, **kwargs}))


def grids(model: nn.Module) -> list[tuple[int, int]]:
    return [m.resolution for m in model.modules() if isinstance(m, (Attention, AttentionDownsample))]


# -- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [230, 250, (230, 100), (33, 250), (512, 65), 17, 1, (1, 64), (64, 1)], ids=str)
def test_any_size_runs(name, size):
    """Odd, non-square and tiny sizes: every grid is the one that forward makes, down to a single pixel."""
    model = build(name)
    timm_resize.resize_(model, size)
    height, width = (size, size) if isinstance(size, int) else size
    stride = 8 if "s8" in name else 16
    reductions = [stride * s for s in (1, 1, 2, 2, 4)]  # block, downsample, block, downsample, block
    assert grids(model) == [(math.ceil(height / r), math.ceil(width / r)) for r in reductions]
    with torch.inference_mode():
        assert torch.isfinite(model(image((height, width)))).all()
    for module in model.modules():
        if isinstance(module, (Attention, AttentionDownsample)):
            assert module.attention_biases.shape[1] == math.prod(module.resolution)
            assert type(module.resolution) is tuple


@pytest.mark.parametrize("name", ["levit_128s", "levit_conv_128s"])
@pytest.mark.parametrize("size", [230, 250])
def test_stock_builds_what_it_cannot_run(name, size):
    """Stock's constructor rounds 230 and 250 down; a size that rounds to the same grid up is the right answer."""
    with pytest.raises(RuntimeError):
        stock(name, img_size=size, **TINY)(image((size, size)))
    rounded = math.ceil(size / 16) * 16
    ours, whole = build(name), build(name)
    timm_resize.resize_(ours, size)
    timm_resize.resize_(whole, rounded)
    assert_close(ours, whole, 0.0)
    theirs = stock(name, img_size=rounded, **TINY)
    theirs.load_state_dict(ours.state_dict())
    assert_same_structure(ours, theirs)
    with torch.inference_mode():
        assert torch.equal(ours(image((size, size))), theirs(image((size, size))))


@pytest.mark.parametrize("name", NAMES)
def test_create_model_repairs_the_constructor(name):
    """A random model asked for at 250 has the grids that its forward makes, and runs."""
    model = timm_resize.create_model(name, img_size=(250, 230), **TINY).eval()
    fresh = stock(name, img_size=(256, 232 if "s8" in name else 240), **TINY)
    assert_same_structure(model, fresh)
    with torch.inference_mode():
        model(image((250, 230)))


def test_a_right_build_needs_no_plan():
    """A model built by stock at a size that divides has nothing to change there."""
    model = stock("levit_128s", img_size=(256, 192), **TINY)
    assert not timm_resize.plan_resize(model, (256, 192))
    assert not timm_resize.plan_resize(model)


def test_a_stem_backbone_is_measured():
    """A stem of the user's is run to find its grid, here one without padding that rounds down."""
    stem = nn.Sequential(nn.Conv2d(3, 32, 7, stride=4), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=4, padding=1))
    model = build("levit_128s", stem_backbone=stem, stem_stride=16)
    timm_resize.resize_(model, (196, 131))
    with torch.no_grad():
        grid = tuple(stem(image((196, 131))).shape[-2:])
        model(image((196, 131)))
    assert grids(model)[0] == grid == (12, 8)


# -- tables ----------------------------------------------------------------------------------

SMOOTH = {
    "exponential": lambda u: torch.exp(-3 * u),
    "gaussian": lambda u: torch.exp(-8 * u * u),
    "cosine": lambda u: torch.cos(torch.pi * u),
    "parabola": lambda u: (1 - u) ** 2,
}
STEPS = [(14, 16, 0.005), (14, 24, 0.026), (7, 14, 0.07), (14, 12, 0.006), (14, 7, 0.017), (7, 4, 0.03)]


@pytest.mark.parametrize("shape", SMOOTH)
@pytest.mark.parametrize(("old", "new", "bound"), STEPS)
def test_a_smooth_table_is_read_back(shape, old, new, bound):
    """A function of the offset (share of the largest) is read at the new offsets better than by half pixels.

    The bound is met by every shape; the cusp of the exponential at offset 0 is the hardest.
    """
    f = SMOOTH[shape]
    before, after = (f(torch.arange(n, dtype=torch.float64) / (n - 1)) for n in (old, new))
    table, want = torch.outer(before, before).reshape(1, -1), torch.outer(after, after)
    ours = offset_table((old, old), (new, new))(table).reshape(new, new)
    half_pixel = F.interpolate(table.reshape(1, 1, old, old), size=(new, new), mode="bicubic", antialias=True)[0, 0]
    error, other = (ours - want).abs().max().item(), (half_pixel - want).abs().max().item()
    assert error < 2 * bound
    assert error < 0.7 * other


@pytest.mark.parametrize(("old", "new"), [((7, 7), (9, 5)), ((14, 7), (7, 14)), ((4, 6), (4, 9)), ((1, 5), (3, 4))])
def test_height_and_width_are_treated_alike(old, new):
    """Transposing the table transposes the result."""
    table = torch.randn(3, *old, generator=torch.Generator().manual_seed(0))
    there = offset_table(old, new)(table.reshape(3, -1)).reshape(3, *new)
    turned = offset_table(old[::-1], new[::-1])(table.mT.reshape(3, -1)).reshape(3, *new[::-1])
    torch.testing.assert_close(there, turned.mT, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["levit_128s", "levit_conv_128s"])
def test_every_table_keeps_both_ends(name):
    """In the model: bias at offset 0 and at the last offsets, bit for bit, for each head of each stage."""
    model = build(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "attention_biases" in n}
    assert len(before) == 5
    old = dict(zip(before, grids(model), strict=True))
    timm_resize.resize_(model, (330, 170))
    new = dict(zip(before, grids(model), strict=True))
    for n, was in before.items():
        was, now = was.reshape(-1, *old[n]), model.get_parameter(n).reshape(-1, *new[n])
        for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            assert torch.equal(was[:, y, x], now[:, y, x])


@pytest.mark.parametrize("resolution", [(15, 15), (9, 14), (14, 7), (1, 3), (1, 1)])
def test_index_is_stocks(resolution):
    """Where pairs look their bias up: as stock's layers compute it, with and without a stride."""
    attn = Attention(8, 4, num_heads=2, resolution=resolution)
    down = AttentionDownsample(8, 8, 4, num_heads=2, resolution=resolution)
    options = dict(device=torch.device("cpu"), dtype=torch.long)
    assert torch.equal(offset_index(resolution, 1, **options), attn.attention_bias_idxs)
    assert torch.equal(offset_index(resolution, 2, **options), down.attention_bias_idxs)


def test_bias_follows_the_true_offset():
    """Between cells the same share of the image apart, a resized block has nearly the bias it had, per head."""
    model = build("levit_128s")
    attn = model.stages[0].blocks[0].attn
    decay = torch.exp(-torch.arange(14.0) / 6)
    with torch.no_grad():
        attn.attention_biases.copy_(torch.outer(decay, decay).reshape(1, -1) * torch.tensor([[1.0], [2.0]]))
    timm_resize.resize_(model, (432, 224))  # 27 rows: old offset d is new offset 2 d
    bias = attn.attention_biases[:, attn.attention_bias_idxs].reshape(2, 27, 14, 27, 14)
    for dy, dx in ((0, 0), (1, 0), (5, 3), (13, 13)):
        want = torch.tensor([1.0, 2.0]) * decay[dy] * decay[dx]
        torch.testing.assert_close(bias[:, 2 * dy, dx, 0, 0], want, atol=0.02, rtol=0)
        torch.testing.assert_close(bias[:, 0, 0, 2 * dy, dx], want, atol=0.02, rtol=0)


def test_interpolation_options_reach_the_tables():
    """`interpolation=` and `antialias=` choose the map."""
    plans = [
        timm_resize.plan_resize(build("levit_128s"), 320, **options)
        for options in ({}, {"interpolation": "bilinear"}, {"antialias": False}, {"preset": "deit"})
    ]
    maps = [next(c.how for c in plan if c.kind == "parameter") for plan in plans]
    assert maps[0] == offset_table((14, 14), (20, 20))
    assert maps[1] == offset_table((14, 14), (20, 20), mode="bilinear")
    assert maps[2] == maps[3] == offset_table((14, 14), (20, 20), antialias=False)


# -- caches and feature wrappers -------------------------------------------------------------


@pytest.mark.parametrize("name", ["levit_128s", "levit_conv_128s"])
def test_no_stale_biases(name):
    """A bias cached by an evaluation before the resize is not used after it."""
    model = build(name)
    clean = copy.deepcopy(model)
    with torch.inference_mode():
        model(image((224, 224)))
        assert model.stages[0].blocks[0].attn.attention_bias_cache
        for m in (model, clean):
            timm_resize.resize_(m, (256, 192))
        assert torch.equal(model(image((256, 192))), clean(image((256, 192))))


@pytest.mark.parametrize("name", ["levit_128s", "levit_384_s8", "levit_conv_128s", "levit_conv_384_s8"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2), (0,), (0, 2)])
def test_feature_wrappers(name, out_indices):
    """features_only: the same features as stock's wrapper built there; only the stages it keeps are touched."""
    options = dict(features_only=True, out_indices=out_indices)
    ours, size = build(name, **options), (256, 320)
    timm_resize.resize_(ours, size)
    theirs = stock(name, img_size=size, **options, **TINY)
    theirs.load_state_dict(ours.state_dict())
    assert_same_structure(ours, theirs)
    with torch.inference_mode():
        for got, want in zip(ours(image(size)), theirs(image(size)), strict=True):
            assert torch.equal(got, want)
        timm_resize.resize_(ours, (250, 33))
        assert [tuple(f.shape[-2:]) for f in ours(image((250, 33)))] == [
            (math.ceil(250 / r), math.ceil(33 / r)) for r in ours.feature_info.reduction()
        ]
    whole = build(name)
    for m in (whole, ours):
        timm_resize.resize_(m, size)
    tables = [p for n, p in whole.named_parameters() if "attention_biases" in n]
    kept = [p for n, p in ours.named_parameters() if "attention_biases" in n]
    assert [p.shape for p in kept] == [p.shape for p in tables[: len(kept)]]


def test_create_model_features_only():
    """The factory passes a size through to both sorts of wrapper."""
    for name in ("levit_128s", "levit_conv_128s"):
        model = timm_resize.create_model(name, img_size=(250, 100), features_only=True, **TINY).eval()
        with torch.inference_mode():
            assert [tuple(f.shape[-2:]) for f in model(image((250, 100)))] == [(16, 7), (8, 4), (4, 2)]


def test_distilled_heads_are_untouched():
    """LevitDistilled inherits the handler; its plan is made of tables, indices and attributes alone."""
    plan = timm_resize.plan_resize(build("levit_128s"), 256)
    names = {c.name for c in plan}
    assert names == {
        "attention_biases",
        "attention_bias_idxs",
        "attention_bias_cache",
        "resolution",
        "input_guard",
        "_traits",
        "_model_args",
    }
    assert {c.kind for c in plan if "head" in c.path} == set()
