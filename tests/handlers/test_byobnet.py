"""ByobNet: bottleneck, lambda, halo and bilinear attention, and the attention pool, at the maps that forward makes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from timm.layers.bottleneck_attn import BottleneckAttn, PosEmbedRel
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer

import timm_resize
from tests.helpers.oracle import assert_same_structure, image, redraw_, stock
from tests.helpers.transposed import transposed
from timm_resize.handlers.byobnet import RelativeOffset, SummedOffset, relative_indices
from timm_resize.resample import Resample

NARROW = {"width_factor": 0.25, "num_classes": 3}


def narrow(name: str):
    """Build a redrawn narrow model at its native size."""
    return redraw_(stock(name, **NARROW))


@pytest.mark.parametrize(("old", "new"), [(8, 14), (16, 9), (7, 7), (8, 1)])
def test_bottleneck_tables_are_read_back_by_stock_logits(old, new):
    """A table of f(offset / (side - 1)), read by stock's relative logits after the resize, still gives f."""

    def f(share: torch.Tensor) -> torch.Tensor:
        return torch.sin(2.0 * share) + torch.cos(share)

    def table(side: int) -> torch.Tensor:
        return f(torch.linspace(-1, 1, 2 * side - 1) if side > 1 else torch.zeros(1))[:, None]

    embed = PosEmbedRel((new, new), dim_head=1, scale=1.0)
    how = Resample((RelativeOffset(2 * old - 1, 2 * new - 1),))
    if new == 1:
        assert torch.equal(how(table(old)), table(old)[old - 1 : old])
    else:
        embed.height_rel.data, embed.width_rel.data = torch.zeros(2 * new - 1, 1), how(table(old))
        got = embed(torch.ones(1, new * new, 1)).detach()[0, :new, :new]  # first row of queries on first row of keys
        offset = torch.arange(new) - torch.arange(new)[:, None]
        torch.testing.assert_close(got, f(offset / (new - 1)), atol=0.03, rtol=0)
        assert got[0, 0] == table(old)[old - 1]  # offset 0


@pytest.mark.parametrize(("old", "new"), [((16, 16), (24, 24)), ((16, 16), (10, 20)), ((8, 12), (12, 8))])
def test_lambda_tables_keep_what_is_summed_over_the_map(old, new):
    """A table of g(offset / (side - 1)) / M becomes g / M': a lambda sums it over M' cells instead of M."""

    def g(size: tuple[int, int]) -> torch.Tensor:
        y, x = (torch.linspace(-1, 1, 2 * n - 1, dtype=torch.float64) for n in size)
        return (1.5 + torch.sin(2 * y)[:, None] + torch.cos(x)) / math.prod(size)

    how = Resample(tuple(SummedOffset(2 * a - 1, 2 * b - 1) for a, b in zip(old, new, strict=True)))
    got = how(g(old)[..., None])[..., 0]
    torch.testing.assert_close(got * math.prod(new), g(new) * math.prod(new), atol=0.03, rtol=0)
    middle = got[new[0] - 1, new[1] - 1]
    torch.testing.assert_close(middle * math.prod(new), g(old)[old[0] - 1, old[1] - 1] * math.prod(old))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_lambda_rows_sum_to_the_ratio_of_cells(mode):
    """By definition of the scale, for every kernel, growing and shrinking; one cell keeps offset 0."""
    for old, new in ((8, 14), (14, 8)):
        rows = SummedOffset(2 * old - 1, 2 * new - 1, mode=mode).matrix().sum(1)
        torch.testing.assert_close(rows, torch.full_like(rows, old / new))
    want = torch.zeros(1, 15, dtype=torch.float64)
    want[0, 7] = 8.0
    torch.testing.assert_close(SummedOffset(15, 1, mode=mode).matrix(), want)


@pytest.mark.parametrize("size", [(8, 8), (3, 5)])
def test_lambda_indices_equal_a_stock_layer(size):
    """The rebuilt index is bit for bit that of a stock layer of the map."""
    layer = LambdaLayer(dim=16, feat_size=size, r=None)
    got = relative_indices(size, device=torch.device("cpu"), dtype=torch.int64)
    assert torch.equal(got, layer.rel_pos_indices)


@pytest.mark.parametrize("name", ["botnet26t_256", "lambda_resnet26rpt_256", "resnet50_clip"])
@pytest.mark.parametrize("size", [(320, 320), (160, 192), (192, 160)])
def test_structure_equals_a_stock_build(name, size):
    """At multiples of 32 stock's constructor counts as its forward does: equal shapes, buffers and attributes."""
    ours = stock(name, **NARROW)
    timm_resize.resize_(ours, size)
    assert_same_structure(ours, stock(name, img_size=size, **NARROW))


@pytest.mark.parametrize("size", [(320, 320), (160, 256)])
def test_attention_pool_computes_what_the_unresized_one_does_at_that_size(size):
    """Stock's pool interpolates its embedding in each forward; after the resize nothing is left to do."""
    model = narrow("resnet50_clip")
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, size)
    assert ours.head.feat_size == (size[0] // 32, size[1] // 32)
    with torch.inference_mode():
        x = image(size)
        torch.testing.assert_close(ours(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "swap"),
    [("botnet26t_256", {"height_rel": "width_rel"}), ("lambda_resnet26rpt_256", {}), ("resnet50_clip", {})],
)
def test_transposed_images_give_the_same_logits(name, swap):
    """H > W and W > H: with kernels and tables transposed, the transposed image gives the same logits."""
    tall = narrow(name)
    wide = transposed(tall, swap)
    for module in wide.modules():
        if isinstance(module, LambdaLayer):
            module.pos_emb.data = module.pos_emb.data.transpose(0, 1).contiguous()
    if name == "resnet50_clip":
        grid = wide.head.pos_embed.data[1:].reshape(7, 7, -1).transpose(0, 1).reshape(49, -1)
        wide.head.pos_embed.data = torch.cat([wide.head.pos_embed.data[:1], grid])
    timm_resize.resize_(tall, (288, 160))
    timm_resize.resize_(wide, (160, 288))
    with torch.inference_mode():
        x = image((288, 160))
        torch.testing.assert_close(tall(x), wide(x.transpose(-1, -2)), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:ByobNet")
@pytest.mark.parametrize(
    ("name", "refused", "runs"),
    [
        ("botnet26t_256", (230, 240, 272), (250, 241, 288)),
        ("lambda_resnet26rpt_256", (230, 240, 272), (250, 288)),
        ("halonet26t", (230, 240, 272, 288, (256, 288), (288, 256)), (250, 256, (256, 500))),
        pytest.param("lamhalobotnet50ts_256", (230, 192, 288), (250, (256, 384)), marks=pytest.mark.slow),
        pytest.param("haloregnetz_b", (230, 240, 256, 272), (224, (224, 448)), marks=pytest.mark.slow),
        ("bat_resnext26ts", (230, 240, 250, 272, 288), (253, (256, 512))),
        ("resnet50_clip", (230, 240, 250, 272), (256, 322)),
    ],
)
def test_odd_sizes_are_decided_by_what_forward_can_do(name, refused, runs):
    """Maps are rounded as forward rounds them; what passes runs, what is refused names a size that passes."""
    kwargs = {"num_classes": 3} if name in ("bat_resnext26ts", "haloregnetz_b") else NARROW
    model = stock(name, device="meta", **kwargs)
    for size in refused:
        with pytest.raises(timm_resize.InvalidSizeError, match=r"Use \(?\d+"):
            timm_resize.plan_resize(model, size)
    for size in runs:
        hw = (size, size) if isinstance(size, int) else size
        timm_resize.resize_(model, size)
        assert model(torch.empty(1, 3, *hw, device="meta")).shape == (1, 3)


def test_a_size_that_stock_constructor_counts_otherwise_is_warned_of():
    """250 pixels make an 8x8 last map, for which stock's constructor would make tables of 7."""
    model = stock("botnet26t_256", **NARROW)
    with pytest.warns(UserWarning, match="gives a 8x8 last map. Stock timm's constructor counts 7x7"):
        timm_resize.resize_(model, 250)
    assert model(image((250, 250))).isfinite().all()
    attention = [m for m in model.modules() if isinstance(m, BottleneckAttn)]
    assert [(a.pos_embed.height, a.pos_embed.width) for a in attention] == [(16, 16), (16, 16), (8, 8)]


@pytest.mark.parametrize("name", ["botnet26t_256", "lambda_resnet26rpt_256"])
def test_features_equal_those_of_a_stock_feature_model_at_the_size(name):
    """features_only flattens the stages: same maps as stock's wrapper at the new size with these weights."""
    kwargs = {"features_only": True, "width_factor": 0.25}
    ours = redraw_(stock(name, **kwargs))
    timm_resize.resize_(ours, (192, 320))
    theirs = stock(name, img_size=(192, 320), **kwargs)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        x = image((192, 320))
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b)


def test_a_feature_model_cut_before_its_attention_takes_any_size():
    """halonet26t has halo attention in its last two stages; the first ones limit nothing."""
    ours = stock("halonet26t", features_only=True, out_indices=(0, 1, 2), width_factor=0.25)
    assert not any(isinstance(m, HaloAttn) for m in ours.modules())
    timm_resize.resize_(ours, 230)
    with torch.inference_mode():
        assert [f.shape[-1] for f in ours(image((230, 230)))] == [115, 58, 29]
