"""EfficientViT (MSRA): tables over offsets, square windows and their cache against stock timm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import timm_resize
from tests.helpers.oracle import assert_close, assert_same_structure, image, redraw_, stock
from timm_resize.errors import InvalidSizeError, ResizeError

SMALL = {"embed_dim": (16, 32, 48), "depth": (1, 1, 2), "num_heads": (2, 2, 3), "key_dim": (8, 8, 8)}
SIZES = [(384, 384), (160, 160), (128, 256), (320, 224), (230, 250), (100, 100), (31, 47), (16, 16)]


def build(**kwargs) -> nn.Module:
    return stock("efficientvit_m0", **{"num_classes": 3, **SMALL, **kwargs})


def attentions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "attention_biases")]


@pytest.mark.parametrize("size", SIZES)
def test_equals_stock_set_input_size(size):
    """Larger, smaller, non-square, odd and tiny sizes give stock's tensors, attributes, records and outputs."""
    model = redraw_(build())
    theirs = copy.deepcopy(model)
    theirs.set_input_size(size)
    timm_resize.resize_(model, size)
    assert_close(model, theirs)
    assert_same_structure(model, theirs)
    assert (model._traits, model._model_args) == (theirs._traits, theirs._model_args)
    with torch.inference_mode():
        torch.testing.assert_close(model(image(size)), theirs(image(size)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_structure_equals_a_fresh_build(size):
    """Windows, indices and the integer `img_size` are those of stock's constructor at the size."""
    model = build()
    timm_resize.resize_(model, size)
    assert_same_structure(model, build(img_size=size))
    assert model.img_size == min(size)
    assert type(model.img_size) is int


def test_only_windows_that_span_the_map_are_resampled():
    """From 224 to 384 the 7x7 windows of the first stages stay, bit for bit; the last grows from 4x4 to 6x6."""
    model = redraw_(build())
    old = [a.attention_biases.detach().clone() for a in attentions(model)]
    plan = timm_resize.resize_(model, 384)
    new = [a.attention_biases.detach() for a in attentions(model)]
    assert [c.key for c in plan if c.kind == "parameter"] == [
        f"stages.2.blocks.{i}.mixer.m.attn.attention_biases" for i in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(old[:2], new[:2], strict=True))
    for a, b in zip(old[2:], new[2:], strict=True):
        table = F.interpolate(a.view(1, 3, 4, 4), size=(6, 6), mode="bicubic", antialias=True)
        torch.testing.assert_close(b, table.reshape(3, 36), atol=1e-6, rtol=0)


def test_an_evaluated_model_forgets_its_cached_biases():
    """The cache that evaluation filled at the old size is gone, so the output is stock's at the new one."""
    model = redraw_(build())
    theirs = copy.deepcopy(model)
    theirs.set_input_size(320)
    with torch.inference_mode():
        model(image((224, 224)))
        assert all(a.attention_bias_cache for a in attentions(model))
        timm_resize.resize_(model, 320)
        torch.testing.assert_close(model(image((320, 320))), theirs(image((320, 320))), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "named"), [((15, 15), "Use 16."), ((15, 224), r"Use \(16, 224\)\."), ((1, 1), "16")])
def test_sizes_below_one_cell_are_refused_whole(size, named):
    """A side below 16 would leave empty windows; it is refused with the model as it was, which stock's is not."""
    model = redraw_(build())
    duplicate = copy.deepcopy(model)
    with pytest.raises(InvalidSizeError, match=named):
        timm_resize.resize_(model, size)
    assert_close(model, duplicate, tolerance=0.0)
    assert_same_structure(model, duplicate)
    with torch.inference_mode():
        assert torch.equal(model(image((224, 224))), duplicate(image((224, 224))))


@pytest.mark.parametrize("out_indices", [(0, 1, 2), (0, 1)])
@pytest.mark.parametrize("size", [(384, 384), (96, 96), (160, 256), (230, 112)])
def test_features_equal_stock_features_only(size, out_indices):
    """The rewritten feature extractor, also without its last stage, gives stock's features at the size."""
    whole = redraw_(build())
    ours = with_weights_of(whole, build(features_only=True, out_indices=out_indices))
    whole.set_input_size(size)
    theirs = with_weights_of(whole, build(features_only=True, out_indices=out_indices, img_size=size))
    timm_resize.resize_(ours, size)
    assert_close(ours, theirs)
    with torch.inference_mode():
        for got, want in zip(ours(image(size)), theirs(image(size)), strict=True):
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()  # rounding grows over three stages


def with_weights_of(whole: nn.Module, extractor: nn.Module) -> nn.Module:
    """Load a model's weights into its feature extractor, which flattens both top-level sequences."""
    flat = (("stages.", "stages_"), ("patch_embed.", "patch_embed_"))
    state = {k.replace(*flat[0]).replace(*flat[1]): v for k, v in whole.state_dict().items()}
    extractor.load_state_dict({k: state[k] for k in extractor.state_dict()})
    return extractor


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"window_policy": "keep"}, [7, 7, 4]),
        ({"window_policy": "scale"}, [14, 14, 14]),
        ({"window_size": 10}, [10, 10, 10]),
        ({"window_size": (14, 7, 5)}, [14, 7, 5]),
    ],
)
def test_windows_can_be_chosen(options, windows):
    """Kept, scaled or given windows have the structure of a stock build with those windows, and are recorded."""
    model = build()
    timm_resize.resize_(model, 448, **options)
    fresh = build(img_size=448, window_size=windows)
    assert_same_structure(model, fresh)
    assert model._model_args["window_size"] == windows
    with torch.inference_mode():
        assert model(image((448, 448))).isfinite().all()


def test_a_window_that_is_not_square_is_refused():
    """The tables are over square windows."""
    with pytest.raises(ResizeError, match=r"window_size=\(8, 4\) is not square"):
        timm_resize.resize_(build(), 256, window_size=(8, 4))
