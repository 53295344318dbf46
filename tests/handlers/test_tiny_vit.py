"""TinyViT: windows are kept, or scaled on request, with their offset tables."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.tiny_vit import Attention

import timm_resize
from tests.helpers.oracle import assert_same_structure, image, redraw_, stock
from tests.helpers.transposed import transposed
from timm_resize.handlers.layers.offset_bias import offset_index

SMALL = {"depths": (1, 1, 2, 1), "num_classes": 3}


@pytest.fixture(scope="module")
def model():
    """A redrawn small tiny_vit_5m at 224, windows 7, 14, 7 in the stages with attention."""
    return redraw_(stock("tiny_vit_5m_224", **SMALL))


def attentions(model) -> list[Attention]:
    return [m for m in model.modules() if isinstance(m, Attention)]


@pytest.mark.parametrize("side", [1, 2, 7, 12])
def test_offset_index_equals_stock(side):
    """TinyViT numbers offsets in order of first sight, which is |dy| * w + |dx|."""
    attention = Attention(8, 4, 2, resolution=(side, side))
    got = offset_index((side, side), 1, device=torch.device("cpu"), dtype=torch.int64)
    assert torch.equal(got, attention.attention_bias_idxs)


@pytest.mark.parametrize("size", [384, 250, (200, 320), 31])
def test_windows_and_weights_are_kept_by_default(model, size):
    """Any size runs with the weights as they are; the logits are those of the untouched model at that size."""
    ours = copy.deepcopy(model)
    plan = timm_resize.resize_(ours, size)
    assert not plan.tensors
    with torch.inference_mode():
        x = image((size, size) if isinstance(size, int) else size)
        assert torch.equal(ours(x), model(x))


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (384, {"window_size": (12, 12, 24, 12)}),
        (384, {"window_policy": "scale"}),
        ((384, 512), {"window_policy": "scale"}),
        ((512, 384), {"window_policy": "scale"}),
    ],
)
def test_scaled_windows_have_the_structure_of_the_published_384_model(model, size, options):
    """224 to 384 with windows 12, 12, 24, 12, given or scaled, equals a stock build; the shorter side decides."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, size, **options)
    want = stock("tiny_vit_5m_224", window_sizes=(12, 12, 24, 12), **SMALL)
    assert_same_structure(ours, want)
    with torch.inference_mode():
        assert ours(image((384, 384))).isfinite().all()


def test_scaling_there_and_back_restores_every_bit(model):
    """Windows 7 to 12 to 7 by policy."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, 384, window_policy="scale")
    timm_resize.resize_(ours, 224, window_policy="scale")
    assert_same_structure(ours, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("sides", [(8, 8, 16, 8), (4, 4, 7, 4)])
def test_a_smooth_function_of_the_offset_is_read_back(model, sides):
    """Tables of f(|dy|/last, |dx|/last) still hold f in the new windows, offset 0 bit for bit."""

    def f(side: int) -> torch.Tensor:
        y = torch.arange(side) / (side - 1)
        return (torch.cos(1.5 * y)[:, None] * (1.0 + 0.5 * torch.cos(2.0 * y))).flatten()

    ours = copy.deepcopy(model)
    for attention in attentions(ours):
        attention.attention_biases.data = f(attention.resolution[0]).repeat(attention.num_heads, 1)
    timm_resize.resize_(ours, 256, window_size=sides)
    assert [a.resolution[0] for a in attentions(ours)] == [sides[1], sides[2], sides[2], sides[3]]
    for attention in attentions(ours):
        want = f(attention.resolution[0])
        torch.testing.assert_close(attention.attention_biases[0], want, atol=0.05, rtol=0)
        assert attention.attention_biases[0, 0] == want[0]


def test_create_model_takes_window_size():
    """create_model(img_size=, window_size=) scales the windows, though stock's keyword is another."""
    ours = timm_resize.create_model("tiny_vit_5m_224", img_size=256, window_size=8, **SMALL)
    assert [a.resolution for a in attentions(ours)] == [(8, 8)] * 4
    stock("tiny_vit_5m_224", **ours._model_args).load_state_dict(ours.state_dict())


def test_stock_rebuilds_a_model_with_scaled_windows_from_what_is_recorded(model):
    """The recorded constructor arguments give stock the windows; without them its tables would not fit."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, 384, window_policy="scale")
    theirs = stock("tiny_vit_5m_224", **ours._model_args)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(ours(image((384, 384))), theirs(image((384, 384))))


def test_windows_must_be_square(model):
    """Stock's blocks have one side for both axes."""
    with pytest.raises(timm_resize.ResizeError, match=r"window_size=\(8, 16\) is not square"):
        timm_resize.plan_resize(model, 256, window_size=(8, 16))


def test_transposed_images_give_the_same_logits(model):
    """H > W and W > H: with kernels and tables transposed, the transposed image gives the same logits."""
    tall, wide = copy.deepcopy(model), transposed(model)
    for attention in attentions(wide):
        table = attention.attention_biases.data.reshape(-1, *attention.resolution)
        attention.attention_biases.data = table.transpose(1, 2).reshape(table.shape[0], -1).contiguous()
    timm_resize.resize_(tall, (288, 160), window_size=9)
    timm_resize.resize_(wide, (160, 288), window_size=9)
    with torch.inference_mode():
        x = image((288, 160))
        torch.testing.assert_close(tall(x), wide(x.transpose(-1, -2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0, 1)])
def test_features_equal_those_of_a_stock_feature_model(indices):
    """features_only, also with stages cut off: windows scale as in a stock wrapper built with them."""
    kwargs = {"features_only": True, "out_indices": indices, "depths": (1, 1, 2, 1)}
    ours = redraw_(stock("tiny_vit_5m_224", **kwargs))
    timm_resize.resize_(ours, 384, window_policy="scale")
    theirs = stock("tiny_vit_5m_224", window_sizes=(12, 12, 24, 12), **kwargs)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        x = image((384, 384))
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b)
