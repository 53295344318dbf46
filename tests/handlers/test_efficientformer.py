"""EfficientFormer v1: the constructor ignores `img_size`; the table and its persistent index follow ours."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.efficientformer import Attention

import timm_resize
from tests.helpers.oracle import image, redraw_, stock
from tests.helpers.transposed import transposed

SMALL = {"depths": (1, 1, 1, 3), "num_vit": 2, "mlp_ratios": 1, "num_classes": 3}


@pytest.fixture(scope="module")
def model():
    """A redrawn small efficientformer_l1 at 224."""
    return redraw_(stock("efficientformer_l1", **SMALL))


def attentions(model) -> list[Attention]:
    return [m for m in model.modules() if isinstance(m, Attention)]


@pytest.mark.parametrize("size", [256, 250, 160, (224, 320), (320, 200), 16])
def test_index_equals_a_stock_layer_of_the_map_that_forward_makes(model, size):
    """After the resize each attention's index is bit for bit that of a stock layer built for ceil(size / 32)."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, size)
    h, w = (size, size) if isinstance(size, int) else size
    grid = (-(-h // 32), -(-w // 32))
    want = Attention(dim=8, key_dim=4, num_heads=2, resolution=grid)
    assert len(attentions(ours)) == 2
    for attention in attentions(ours):
        assert torch.equal(attention.attention_bias_idxs, want.attention_bias_idxs)
        assert attention.attention_biases.shape == (8, grid[0] * grid[1])
    with torch.inference_mode():
        assert ours(image((h, w))).isfinite().all()


def test_index_stays_in_the_checkpoint_and_is_not_shared(model):
    """The index is persistent in stock: it is saved under its name, one tensor per layer as safetensors requires."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, 256)
    saved = {k: v for k, v in ours.state_dict().items() if k.endswith("attention_bias_idxs")}
    assert saved.keys() == {k for k in model.state_dict() if k.endswith("attention_bias_idxs")}
    assert len({v.data_ptr() for v in saved.values()}) == 2


@pytest.mark.parametrize("size", [(320, 320), (160, 160), (224, 352)])
def test_a_smooth_function_of_the_offset_is_read_back(model, size):
    """Tables of f(|dy|/last, |dx|/last) still hold f at the new grid, offset 0 bit for bit."""

    def f(h: int, w: int) -> torch.Tensor:
        y, x = torch.arange(h) / (h - 1), torch.arange(w) / (w - 1)
        return (torch.cos(1.5 * y)[:, None] * (1.0 + 0.5 * torch.cos(2.0 * x))).flatten()

    ours = copy.deepcopy(model)
    for attention in attentions(ours):
        attention.attention_biases.data = f(7, 7).repeat(8, 1)
    timm_resize.resize_(ours, size)
    for attention in attentions(ours):
        want = f(size[0] // 32, size[1] // 32)
        torch.testing.assert_close(attention.attention_biases[0], want, atol=0.05, rtol=0)
        assert attention.attention_biases[0, 0] == want[0]


def test_creating_at_a_size_that_stock_ignores_makes_a_model_that_runs_there():
    """Stock builds 7x7 tables at img_size=256 and fails in forward; ours gets 8x8 tables, also on the meta device."""
    broken = stock("efficientformer_l1", img_size=256, **SMALL)
    with pytest.raises(RuntimeError):
        broken(image((256, 256)))
    for device in ("cpu", "meta"):
        ours = timm_resize.create_model("efficientformer_l1", img_size=256, device=device, **SMALL).eval()
        assert [a.attention_biases.shape[1] for a in attentions(ours)] == [64, 64]
    ours = timm_resize.create_model("efficientformer_l1", img_size=256, **SMALL).eval()
    assert ours(image((256, 256))).isfinite().all()


def test_grid_is_told_from_the_index_not_from_the_number_of_cells():
    """49 offsets recorded for 32x1568 pixels (1x49) are still the constructor's 7x7."""
    model = stock("efficientformer_l1", img_size=(32, 1568), **SMALL)
    plan = timm_resize.plan_resize(model, 256)
    maps = [c.how for c in plan if c.kind == "parameter"]
    assert [[(a.old, a.new) for a in how.axes] for how in maps] == [[(7, 8), (7, 8)]] * 2


def test_transposed_images_give_the_same_logits(model):
    """H > W and W > H: with kernels and tables transposed, the transposed image gives the same logits."""
    tall, wide = copy.deepcopy(model), transposed(model)
    for attention in attentions(wide):
        table = attention.attention_biases.data.reshape(8, 7, 7)
        attention.attention_biases.data = table.transpose(1, 2).reshape(8, 49).contiguous()
    timm_resize.resize_(tall, (288, 160))
    timm_resize.resize_(wide, (160, 288))
    with torch.inference_mode():
        x = image((288, 160))
        torch.testing.assert_close(tall(x), wide(x.transpose(-1, -2)), atol=1e-4, rtol=1e-4)


def test_features_equal_those_of_the_resized_plain_model(model):
    """features_only: stock cannot build it at the size, so the plain model's own stages are the reference."""
    ours = stock("efficientformer_l1", features_only=True, **{k: v for k, v in SMALL.items() if k != "num_classes"})
    missing = ours.model.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    plain = copy.deepcopy(model)
    timm_resize.resize_(ours, (192, 256))
    timm_resize.resize_(plain, (192, 256))
    with torch.inference_mode():
        x = image((192, 256))
        want = plain.forward_intermediates(x, intermediates_only=True)
        for a, b in zip(ours(x), want, strict=True):
            torch.testing.assert_close(a, b)


def test_features_of_the_last_stage_need_an_even_map():
    """Stock's feature extraction halves the map before the last stage rounding down: 230 (15x15) is refused."""
    kwargs = {k: v for k, v in SMALL.items() if k != "num_classes"}
    last = stock("efficientformer_l1", features_only=True, **kwargs)
    with pytest.raises(timm_resize.InvalidSizeError, match=r"15x15 map .* Use 224 or 241"):
        timm_resize.resize_(last, 230)
    timm_resize.resize_(last, 241)
    assert [f.shape[-1] for f in last(image((241, 241)))] == [61, 31, 16, 8]
    early = stock("efficientformer_l1", features_only=True, out_indices=(0, 1, 2), **kwargs)
    timm_resize.resize_(early, 230)
    assert [f.shape[-1] for f in early(image((230, 230)))] == [58, 29, 15]


def test_a_plan_says_what_stocks_features_cannot_do(model):
    """The plain model runs at 230 pixels; that its `forward_intermediates` does not is noted, and at 256 nothing is."""
    ours = copy.deepcopy(model)
    assert not timm_resize.plan_resize(ours, 256).notes
    (note,) = timm_resize.resize_(ours, 230).notes
    assert note == "forward_intermediates cannot reshape the last stage's output after an odd map (15x15)"
    with torch.inference_mode():
        assert ours(image((230, 230))).isfinite().all()
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            ours.forward_intermediates(image((230, 230)))
