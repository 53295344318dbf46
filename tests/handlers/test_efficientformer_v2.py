"""EfficientFormer v2: offset tables on the maps that forward makes, and the sizes that its upsampling allows."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.efficientformer_v2 import Attention2d, Attention2dDownsample

import timm_resize
from tests.helpers.oracle import image, redraw_, stock
from tests.helpers.transposed import transposed
from timm_resize.handlers.layers.offset_bias import offset_index

SMALL = {"depths": (1, 1, 2, 2), "num_vit": 1, "mlp_ratios": (1, 1, 1, 1), "num_classes": 3}


@pytest.fixture(scope="module")
def model():
    """A redrawn small efficientformerv2_s0 at 224."""
    return redraw_(stock("efficientformerv2_s0", **SMALL))


@pytest.mark.parametrize("size", [(7, 7), (5, 8), (8, 5), (1, 4)])
def test_offset_index_equals_stock(size):
    """Same index as stock's constructors make, for attention on the map and for queries on every second cell."""
    plain = Attention2d(dim=8, key_dim=4, num_heads=2, resolution=size)
    halved = Attention2dDownsample(dim=8, key_dim=4, num_heads=2, resolution=size)
    for stock_index, step in ((plain.attention_bias_idxs, 1), (halved.attention_bias_idxs, 2)):
        got = offset_index(size, step, device=torch.device("cpu"), dtype=torch.int64)
        assert torch.equal(got, stock_index)


@pytest.mark.parametrize("size", [(320, 320), (160, 160), (224, 352), (250, 192)])
def test_a_smooth_function_of_the_offset_is_read_back(model, size):
    """Tables of f(|dy|/last, |dx|/last), gathered by the modules' own index after the resize, still give f."""

    def f(grid: tuple[int, int]) -> torch.Tensor:
        y, x = (torch.arange(n) / max(n - 1, 1) for n in grid)
        return torch.cos(1.5 * y)[:, None] * (1.0 + 0.5 * torch.cos(2.0 * x))

    ours = copy.deepcopy(model)
    attentions = [m for m in ours.modules() if hasattr(m, "attention_biases")]
    assert len(attentions) == 3
    for attention in attentions:
        attention.attention_biases.data = f(attention.resolution).reshape(1, -1).repeat(8, 1)
    timm_resize.resize_(ours, size)
    for attention in attentions:
        want = f(attention.resolution).flatten()
        torch.testing.assert_close(attention.attention_biases[0], want, atol=0.05, rtol=0)
        assert attention.attention_biases[0, 0] == want[0]  # offset 0
        gathered = attention.get_attention_biases(torch.device("cpu"))
        assert gathered.shape[-1] == attention.resolution[0] * attention.resolution[1]


def test_cached_biases_are_dropped(model):
    """A forward before the resize fills a cache; one after it uses the new table."""
    ours = copy.deepcopy(model)
    with torch.inference_mode():
        ours(image((224, 224)))
        timm_resize.resize_(ours, 256)
        once = ours(image((256, 256)))
        for module in ours.modules():
            if hasattr(module, "attention_bias_cache"):
                module.attention_bias_cache = {}
        torch.testing.assert_close(once, ours(image((256, 256))), atol=0, rtol=0)


@pytest.mark.parametrize("size", [230, 240, 272, 16, (224, 240)])
def test_odd_maps_at_a_sixteenth_are_refused(model, size):
    """Attention of stage 3 halves the map, then doubles it: with an odd side forward cannot add it back."""
    ours = copy.deepcopy(model)
    with pytest.raises(timm_resize.InvalidSizeError, match="not divisible by its stride=2"):
        timm_resize.resize_(ours, size)
    timm_resize.resize_(ours, timm_resize.nearest_sizes(ours, size)[0])


@pytest.mark.parametrize("size", [250, 241, 17, (177, 255)])
def test_sizes_that_round_up_to_even_run(model, size):
    """Stem and stages round up: 241 to 256 pixels give the same 16x16 map."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, size)
    size = (size, size) if isinstance(size, int) else size
    with torch.inference_mode():
        assert ours(image(size)).isfinite().all()


def test_transposed_images_give_the_same_logits(model):
    """H > W and W > H: with kernels and tables transposed, the transposed image gives the same logits."""
    tall, wide = copy.deepcopy(model), transposed(model)
    for m in wide.modules():
        if hasattr(m, "attention_biases"):  # square at 224
            table = m.attention_biases.data.reshape(8, *m.resolution)
            m.attention_biases.data = table.transpose(1, 2).reshape(8, -1).contiguous()
    timm_resize.resize_(tall, (288, 160))
    timm_resize.resize_(wide, (160, 288))
    with torch.inference_mode():
        x = image((288, 160))
        torch.testing.assert_close(tall(x), wide(x.transpose(-1, -2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (0,)])
def test_features_equal_those_of_a_stock_feature_model_at_the_size(indices):
    """features_only, also with stages cut off: same maps as stock's wrapper at the new size with these weights."""
    kwargs = {k: v for k, v in SMALL.items() if k != "num_classes"}
    ours = redraw_(stock("efficientformerv2_s0", features_only=True, out_indices=indices, **kwargs))
    timm_resize.resize_(ours, (192, 320))
    theirs = stock("efficientformerv2_s0", features_only=True, out_indices=indices, img_size=(192, 320), **kwargs)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        x = image((192, 320))
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b)


def test_without_the_strided_stage_any_size_is_valid():
    """A feature model cut after stage 2 has no attention left, so nothing limits its size."""
    ours = stock("efficientformerv2_s0", features_only=True, out_indices=(0, 1), **SMALL)
    timm_resize.resize_(ours, 230)
    with torch.inference_mode():
        assert [tuple(f.shape[-2:]) for f in ours(image((230, 230)))] == [(58, 58), (29, 29)]
