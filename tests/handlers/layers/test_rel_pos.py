"""Relative position layers, and VisionTransformerRelPos, against fresh stock builds and stock's own resizing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from torch import nn

import timm_resize
from tests.helpers.oracle import assert_same_structure, first, image, redraw_, stock
from timm_resize.core.apply import apply_plan
from timm_resize.core.context import Context, Invalid
from timm_resize.core.plan import ResizePlan
from timm_resize.core.request import Request
from timm_resize.handlers.layers.rel_pos import offset_lookup

LAYERS = {
    "bias": lambda window, **kw: RelPosBias(window, num_heads=3, **kw),
    "bias with class token": lambda window, **kw: RelPosBias(window, num_heads=3, prefix_tokens=1, **kw),
    "tf": lambda window, **kw: RelPosBiasTf(window, num_heads=3, **kw),
    "mlp": lambda window, **kw: RelPosMlp(window, num_heads=3, hidden_dim=8, **kw),
    "mlp with class token": lambda window, **kw: RelPosMlp(window, num_heads=3, prefix_tokens=1, **kw),
    "mlp swin": lambda window, **kw: RelPosMlp(window, num_heads=3, mode="swin", **kw),
    "mlp swin pretrained": lambda window, **kw: RelPosMlp(window, mode="swin", pretrained_window_size=(6, 6), **kw),
}
WINDOWS = [((7, 7), (8, 8)), ((7, 7), (5, 9)), ((4, 6), (6, 4)), ((8, 8), (3, 3)), ((5, 5), (5, 8)), ((2, 2), (16, 12))]
RELPOS = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 3}


def resized(layer: nn.Module, window: tuple[int, int], **request) -> nn.Module:
    """Return a copy of a layer at another window, through its handler alone."""
    root = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    ctx = Context(root, Request(**request), None, window)
    changes = tuple(ctx.visit(root["layer"], window=window))
    apply_plan(root, ResizePlan("ModuleDict", None, window, changes))
    return root["layer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_structure_equals_a_fresh_layer(kind, dtype):
    """Shapes, attributes and every bit of the buffers are those of stock's constructor, in each dtype."""
    for old, new in WINDOWS:
        assert_same_structure(resized(LAYERS[kind](old, dtype=dtype), new), LAYERS[kind](new, dtype=dtype))
        cast = resized(LAYERS[kind](old).to(dtype), new)
        assert_same_structure(cast, LAYERS[kind](new).to(dtype))


@pytest.mark.parametrize("kind", [k for k in LAYERS if "mlp" not in k])
def test_tables_equal_stock_set_window_size(kind):
    """Tables have stock's values to 1e-5, over larger, smaller and non-square windows."""
    for old, new in WINDOWS:
        theirs = redraw_(LAYERS[kind](old))
        ours = resized(theirs, new)
        theirs.set_window_size(new)
        assert ours.get_bias().shape == theirs.get_bias().shape
        torch.testing.assert_close(ours.get_bias(), theirs.get_bias(), atol=1e-5, rtol=0)


def test_class_token_rows_are_copied():
    """The last three rows (class to tokens, tokens to class, class to class) keep every bit."""
    layer = redraw_(LAYERS["bias with class token"]((7, 7)))
    table = resized(layer, (9, 4)).relative_position_bias_table
    assert table.shape == (17 * 7 + 3, 3)
    assert torch.equal(table[-3:], layer.relative_position_bias_table[-3:])


@pytest.mark.parametrize("kind", ["bias", "tf"])
def test_table_interpolation_can_be_asked_for(kind):
    """With interpolation='bicubic' a table is torch's antialiased bicubic image of the old one, row for row."""
    layer = redraw_(LAYERS[kind]((7, 7)))
    ours = resized(layer, (10, 8), table_mode="bicubic").relative_position_bias_table
    old = layer.relative_position_bias_table.detach()
    as_image = old.T.reshape(1, 3, 13, 13) if kind == "bias" else old[None]
    want = F.interpolate(as_image, size=(19, 15), mode="bicubic", antialias=True)[0]
    want = want.reshape(3, -1).T if kind == "bias" else want
    torch.testing.assert_close(ours.detach(), want, atol=1e-5, rtol=1e-5)


def test_offset_lookup_by_hand():
    """Of two positions, the key before the query has offset 0, the same offset 1, the one after offset 2."""
    want = torch.tensor([[[0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0]]], dtype=torch.float32)
    assert torch.equal(offset_lookup(2, device=torch.device("cpu"), dtype=torch.float32), want)


@pytest.mark.parametrize("window", [(1, 1), (1, 4), (4, 1)])
def test_normalised_coordinates_refuse_a_side_of_one(window):
    """Stock's 'swin' coordinates are 0 / 0 there, so its bias is NaN: refused. The other modes run."""
    assert LAYERS["mlp swin"](window).get_bias().isnan().any()
    with pytest.raises(Invalid, match=r"window, whose coordinates divide by zero at a side of 1"):
        resized(LAYERS["mlp swin"]((4, 4)), window)
    for kind in ("mlp", "mlp swin pretrained"):
        assert resized(LAYERS[kind]((4, 4)), window).get_bias().isfinite().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_same_window_is_empty(kind):
    """A layer that has the window already gets no change."""
    root = nn.ModuleDict({"layer": LAYERS[kind]((6, 5))})
    ctx = Context(root, Request(), None, (6, 5))
    assert list(ctx.visit(root["layer"], window=(6, 5))) == []


# -- VisionTransformerRelPos ---------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "bias"])
def test_blocks_follow_stock_one_by_one(kind, shared):
    """Every block's output equals stock's after its `set_input_size`, with own and with shared positions."""
    model = redraw_(stock("vit_relpos_small_patch16_224", rel_pos_type=kind, shared_rel_pos=shared, **RELPOS))
    for size in ((256, 256), (160, 208), (320, 96)):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        theirs.set_input_size(size)
        timm_resize.resize_(ours, size)
        with torch.inference_mode():
            got = ours.forward_intermediates(image(size), intermediates_only=True)
            want = theirs.forward_intermediates(image(size), intermediates_only=True)
        assert len(got) == 2
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_patch_size_equals_stock():
    """A change of patch size gives stock's projection, grid and biases; the reduction follows, as it does not there."""
    model = redraw_(stock("vit_relpos_base_patch32_plus_rpn_256", **RELPOS))
    for size, patch in (((256, 256), (16, 16)), ((192, 128), (8, 16))):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        theirs.set_input_size(size, patch_size=patch)
        timm_resize.resize_(ours, size, patch_size=patch)
        assert_same_structure(ours, theirs, ignore={"feature_info"})
        assert ours._model_args == theirs._model_args
        assert ours.feature_info[0]["reduction"] == max(patch)
        weights = ours.patch_embed.proj.weight, theirs.patch_embed.proj.weight
        torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(ours(image(size)), theirs(image(size)), atol=1e-4, rtol=1e-4)


def test_odd_sizes_drop_pixels_with_one_warning():
    """250 px keep 15 patches of 16, as stock's forward does, and say so once."""
    model = redraw_(stock("vit_relpos_small_patch16_224", rel_pos_type="bias", **RELPOS))
    theirs = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="drops 10 rows and 2 columns of pixels") as caught:
        timm_resize.resize_(model, (250, 242))
    assert len(caught) == 1
    theirs.set_input_size((250, 242))
    assert_same_structure(model, theirs)
    x = image((250, 242))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=1e-5)
        x[:, :, 240:] = x[:, :, :, 240:] = 9.0
        torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_features_only_equals_stock():
    """A feature wrapper resizes too, and its maps equal those of a stock wrapper resized inside."""
    ours = redraw_(stock("vit_relpos_medium_patch16_cls_224", features_only=True, out_indices=(0, 1), **RELPOS))
    theirs = copy.deepcopy(ours)
    theirs.model.set_input_size((288, 160))
    timm_resize.resize_(ours, (288, 160))
    with torch.inference_mode():
        for a, b in zip(ours(image((288, 160))), theirs(image((288, 160))), strict=True):
            assert a.shape[2:] == (18, 10)
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_sizes_that_cannot_work():
    """Less than a patch is refused, and one patch where the coordinates would be NaN; the next valid size is named."""
    model = stock("test_vit_relpos", depth=1, device="meta")
    with pytest.raises(timm_resize.InvalidSizeError, match=r"is smaller than patch_size=16\. Use 16\."):
        timm_resize.plan_resize(model, 12)
    model = stock("test_vit_relpos", depth=1, rel_pos_type="mlp_swin")
    assert first(copy.deepcopy(model)(image((160, 160)))).isfinite().all()
    with pytest.raises(timm_resize.InvalidSizeError, match=r"a 1x1 window.*Use 32\."):
        timm_resize.plan_resize(model, 16)
    model.set_input_size((16, 16))
    assert model(image((16, 16))).isnan().all()  # what stock does


def test_position_tables_need_no_warning():
    """A size in whole patches warns of nothing."""
    model = stock("vit_srelpos_small_patch16_224", **RELPOS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_resize.resize_(model, (208, 304))
