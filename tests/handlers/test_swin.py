"""Swin v1, v2 and v2-CR: windows, masks and shifts against stock timm."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers.pos_embed_rel import gen_relative_position_index
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention

import timm_resize
from tests.helpers.examples import mostly_slow
from tests.helpers.oracle import assert_close, assert_same_structure, first, image, redraw_, stock, tensors
from timm_resize.core.find import find_model
from timm_resize.core.planner import plan_request
from timm_resize.core.request import make_request
from timm_resize.errors import InvalidSizeError
from timm_resize.handlers.layers.relative_position import relative_position_index
from timm_resize.handlers.layers.windows import shifted_window_mask, wraps
from timm_resize.handlers.swin_transformer_v2 import log_coordinates
from timm_resize.handlers.swin_transformer_v2_cr import log_offsets

V1, V2, CR = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"
ALL = (V1, V2, CR)
SMALL = {"embed_dim": 16, "num_heads": (1, 2, 2, 2), "depths": (2, 2, 2, 2), "num_classes": 3}


def by_turns(*cases):
    """Return each case for each version; by default for one of them, in turn."""
    return [
        pytest.param(name, case, marks=[pytest.mark.slow] * (at % len(ALL) != turn))
        for turn, name in enumerate(ALL)
        for at, case in enumerate(cases)
    ]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def small(name, **kwargs):
    return stock(name, **{**SMALL, **kwargs})


@pytest.fixture(scope="module")
def weights():
    """Redrawn weights of each small model at its native size."""
    return {name: redraw_(stock(name, **SMALL)).state_dict() for name in ALL}


def trained(name, weights, **kwargs):
    """Build a small native-size model with the redrawn weights."""
    model = small(name, **kwargs)
    model.load_state_dict(weights[name], strict="strict_img_size" not in kwargs)
    return model


def both(name, weights, **args):
    """Create the same pretrained model with ours and with stock."""
    kwargs = {**SMALL, **args, "pretrained": True}
    kwargs["pretrained_cfg_overlay"] = {"state_dict": weights[name], "num_classes": 3}
    return timm_resize.create_model(name, **kwargs).eval(), stock(name, **copy.deepcopy(kwargs))


def assert_equal(ours, theirs, size, ignore=frozenset()):
    """Tensors, structure and the output for an image of `size` agree."""
    assert_close(ours, theirs)
    assert_same_structure(ours, theirs, ignore=ignore)
    with torch.inference_mode():
        x = image(size)
        torch.testing.assert_close(first(ours(x)), first(theirs(x)), atol=1e-5, rtol=1e-5)


def windows_of(model):
    return [stage.blocks[0].window_size for stage in getattr(model, "layers", None) or model.stages]


# -- the spellings users copy ----------------------------------------------------------------


def test_headless_swin_built_without_strict_img_size(weights):
    """`create_model(img_size=512, strict_img_size=False, global_pool='', num_classes=0)`: as stock, any input runs."""
    asked = {"img_size": 512, "strict_img_size": False, "global_pool": "", "num_classes": 0}
    body = {k: v for k, v in weights[V1].items() if not k.startswith("head.")}
    args = {**SMALL, **asked, "pretrained": True, "pretrained_cfg_overlay": {"state_dict": body, "num_classes": 0}}
    theirs = stock(V1, **copy.deepcopy(args))
    with timm_resize.install():
        ours = timm.create_model(V1, **args).eval()
        real = timm.create_model("swin_base_patch4_window7_224", device="meta", **asked)
    assert_equal(ours, theirs, (512, 512))
    assert all(block.attn_mask is None for stage in ours.layers for block in stage.blocks)
    with torch.inference_mode():
        assert ours(image((256, 384))).shape == (1, 8, 12, 128)
        torch.testing.assert_close(ours(image((256, 384))), theirs(image((256, 384))), atol=1e-5, rtol=1e-5)
    assert real.patch_embed.grid_size == (128, 128)
    assert windows_of(real) == [(7, 7)] * 4


def test_headless_cr_set_to_512():
    """`create_model(..., global_pool='', num_classes=0).set_input_size(img_size=512)`: as stock."""
    asked = {"global_pool": "", "num_classes": 0}
    theirs = redraw_(small("swinv2_cr_small_ns_224", depths=(2, 1, 1, 1), **asked))
    ours = copy.deepcopy(theirs)
    theirs.set_input_size(img_size=512)
    with timm_resize.install():
        ours.set_input_size(img_size=512)
        real = timm.create_model("swinv2_cr_small_ns_224", device="meta", **asked)
        real.set_input_size(img_size=512)
    assert_equal(ours, theirs, (512, 512))
    assert ours._model_args == theirs._model_args
    assert windows_of(real) == [(16, 16)] * 4
    assert real.stages[0].blocks[1].attn_mask.shape == (64, 256, 256)


# -- which window ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    by_turns(
        {"img_size": (256, 192), "window_size": 5},
        {"img_size": (192, 256), "window_size": (4, 6)},
        {"img_size": (256, 256), "window_size": (8, 8, (16, 8), 4)},
        {"window_size": 4},
        {"img_size": (122, 160), "window_ratio": 4},
        {"img_size": (160, 128), "window_ratio": (8, 8, 4, 16)},
        {"img_size": (160, 96), "always_partition": True},
        {"img_size": (64, 96), "window_size": 10, "always_partition": True},
    ),
)
def test_window_options_equal_stock(name, options, weights):
    """window_size (int, pair, per stage), window_ratio and always_partition do what stock's `set_input_size` does."""
    ours = trained(name, weights)
    theirs = copy.deepcopy(ours)
    theirs.set_input_size(**options)
    timm_resize.resize_(ours, options.get("img_size"), **{k: v for k, v in options.items() if k != "img_size"})
    assert_equal(ours, theirs, theirs.patch_embed.img_size)
    assert ours._model_args == theirs._model_args
    theirs.set_input_size(img_size=(256, 288))  # scales from the windows just given
    timm_resize.resize_(ours, (256, 288))
    assert_same_structure(ours, theirs)


@pytest.mark.parametrize("name", [V1, V2])
def test_patch_size_equals_stock(name, weights):
    """A new patch size resamples the projection, rescales windows with the grid, and doubles the reductions."""
    ours = trained(name, weights)
    theirs = copy.deepcopy(ours)
    theirs.set_input_size(img_size=(320, 256), patch_size=(8, 8))
    timm_resize.resize_(ours, (320, 256), patch_size=8)
    assert_equal(ours, theirs, (320, 256))
    assert ours._model_args == theirs._model_args
    assert [i["reduction"] for i in ours.feature_info] == [8, 16, 32, 64]


@pytest.mark.parametrize("name", ALL)
def test_window_policy_keep_equals_naming_the_window(name, weights):
    """`window_policy="keep"` is stock's `set_input_size(window_size=<the constructor's>)`."""
    ours = trained(name, weights)
    theirs = copy.deepcopy(ours)
    window = theirs._ref_window_sizes
    theirs.set_input_size(img_size=(320, 448), window_size=window)
    timm_resize.resize_(ours, (320, 448), window_policy="keep")
    assert_equal(ours, theirs, (320, 448))
    assert ours._model_args == theirs._model_args


@pytest.mark.parametrize("name", ALL)
def test_a_new_model_with_window_policy_scale(name, weights):
    """`create_model(window_policy="scale")` gives what stock gives in two steps: build, then `set_input_size`."""
    theirs = trained(name, weights)
    theirs.set_input_size(img_size=(320, 448))
    overlay = {"state_dict": weights[name], "num_classes": 3}
    ours = timm_resize.create_model(
        name, img_size=(320, 448), window_policy="scale", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL
    ).eval()
    assert_close(ours, theirs)
    assert windows_of(ours) == windows_of(theirs)


@pytest.mark.parametrize(
    ("name", "args"), by_turns({}, {"window_size": 8}, {"window_size": (8, 8, (16, 8), 4)}, {"window_size": (8, 4)})
)
def test_a_new_model_has_the_constructors_windows(name, args, weights):
    """`create_model(img_size=..., window_size=...)` from native weights equals stock's, in structure and values."""
    ours, theirs = both(name, weights, img_size=(256, 320), **args)
    assert_equal(ours, theirs, (256, 320))
    assert ours._model_args == theirs._model_args


@pytest.mark.parametrize("ratio", [4, (8, 8, 4, 2), 16])
def test_cr_windows_come_from_the_ratio_it_was_built_with(ratio, weights):
    """A CR model built from a window_ratio gets that ratio's windows at another size, as its constructor gives."""
    ours, theirs = both(CR, weights, img_size=(128, 192), window_ratio=ratio)
    assert_equal(ours, theirs, (128, 192))


@pytest.mark.parametrize(
    "options",
    [
        {"window_ratio": 0},
        {"window_ratio": (8, 8)},
        {"window_ratio": "8"},
        {"window_size": (7, 7, 7)},
        {"window_size": 0},
    ],
)
def test_bad_window_options_raise(options):
    """A window option that is no positive integer, or has the wrong count, raises and names it; nothing changes."""
    model = small(V1, device="meta")
    before = windows_of(model)
    with pytest.raises(InvalidSizeError, match=next(iter(options))):
        timm_resize.resize_(model, 256, **options)
    assert windows_of(model) == before


# -- shifts and masks ------------------------------------------------------------------------


def stock_mask(feat, window, shift, dtype):
    """Return the mask that stock's block builds for its geometry."""
    block = SimpleNamespace(
        input_resolution=feat, window_size=window, window_area=window[0] * window[1], shift_size=shift
    )
    return SwinTransformerBlock.get_attn_mask(block, device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_equal_stock_bit_for_bit(dtype):
    """Over odd maps, unequal windows and an axis without a shift, in half precision too."""
    sizes = [1, 5, 8, 13, 14, 15]
    compared = 0
    for feat in [(h, w) for h in sizes for w in sizes]:
        for window in ((1, 4), (4, 4), (7, 5), (8, 14)):
            for shift in ((window[0] // 2, window[1] // 2), (0, window[1] // 2), (window[0] // 2, 0)):
                if not any(shift):
                    continue
                padded = tuple(-(-n // w) * w for n, w in zip(feat, window, strict=True))
                ours = shifted_window_mask(padded, window, shift, device="cpu", dtype=dtype)
                theirs = stock_mask(feat, window, shift, dtype)
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)
                assert torch.equal(torch.signbit(ours), torch.signbit(theirs))  # no negative zeros
                compared += 1
    assert compared == 36 * 11


@pytest.mark.parametrize("window", [(1, 1), (1, 6), (7, 7), (12, 5), (16, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_coordinates_and_indices_equal_stock_bit_for_bit(window, dtype):
    """v2's table and index and CR's offsets, as stock's layers make them, in half precision too."""
    for pretrained in ((0, 0), (12, 12), (6, 6)):
        v2 = WindowAttentionV2(8, window, 2, pretrained_window_size=pretrained, dtype=dtype)
        table = log_coordinates(window, pretrained, device="cpu", dtype=dtype)
        assert torch.equal(table, v2.relative_coords_table)
        assert table.dtype == dtype
        index = relative_position_index(window, device="cpu", dtype=torch.long)
        assert torch.equal(index, v2.relative_position_index)
    for token in (False, True):
        want = gen_relative_position_index(window, class_token=token)
        assert torch.equal(relative_position_index(window, token, device="cpu", dtype=torch.long), want)
    cr = WindowMultiHeadAttention(8, 2, window, dtype=dtype)
    assert torch.equal(log_offsets(window, device="cpu", dtype=dtype), cr.relative_coordinates_log)


def mixes_edges(size, window, shift):
    """Whether stock's mask lets two cells attend that only the roll made neighbours, by following each cell."""
    if not shift:
        return False
    padded = -(-size // window) * window
    cells = torch.nn.functional.pad(torch.arange(size).roll(-shift), (0, padded - size), value=-1).view(-1, window)
    mask = stock_mask((size, 1), (window, 1), (shift, 0), torch.float32)
    for row, allowed in zip(cells, mask == 0, strict=True):
        for i, a in enumerate(row.tolist()):
            for j, b in enumerate(row.tolist()):
                if a >= 0 and b >= 0 and allowed[i, j] and abs(a - b) >= window:
                    return True
    return False


def test_windows_that_mix_the_edges_are_known():
    """The rule behind the note agrees with following every cell through stock's roll, pad and mask."""
    pairs = [(size, window) for window in range(2, 9) for size in range(window + 1, 26)]
    found = {(size, window): mixes_edges(size, window, window // 2) for size, window in pairs}
    assert found == {(n, w): wraps((n, w), (w, w), (w // 2, 0)) for n, w in found}
    assert not found[15, 5]
    assert not found[17, 5]
    assert found[16, 5]


def test_a_plan_notes_windows_that_do_not_divide():
    """The note names the stage and the windows that divide; windows that divide leave none."""
    model = small(V1, device="meta")
    plan = timm_resize.plan_resize(model, 256, window_size=7)
    assert [note.split(":")[0] for note in plan.notes] == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert "Windows that divide: 2, 4, 8, 16." in plan.notes[2]
    assert not timm_resize.plan_resize(model, 256).notes
    assert not timm_resize.plan_resize(model, 448, window_size=7).notes


def test_a_shift_comes_back_when_the_window_grows(weights):
    """A model built with windows of one cell, grown, equals one built at that size; in stock it never shifts again."""
    want = trained(CR, weights)
    tiny = small(CR, img_size=32)
    tiny.load_state_dict(weights[CR])
    theirs = copy.deepcopy(tiny)
    theirs.set_input_size(img_size=224)
    assert not any(any(b.shift_size) for s in theirs.stages for b in s.blocks)
    scaled, named = copy.deepcopy(tiny), tiny
    timm_resize.resize_(scaled, 224)
    timm_resize.resize_(named, 160, window_size=9)
    timm_resize.resize_(named, 224, window_size=7)
    assert_equal(scaled, want, (224, 224), ignore={"_ref_window_sizes", "_ref_grid_size", "target_shift_size"})
    assert_equal(named, want, (224, 224), ignore={"target_shift_size"})


def test_dynamic_models_keep_no_mask(weights):
    """With `dynamic_img_size` masks are made in forward: none is stored, before or after a resize."""
    for name in ALL:
        ours = trained(name, weights, dynamic_img_size=True)
        theirs = copy.deepcopy(ours)
        theirs.set_input_size(img_size=(320, 256))
        plan = timm_resize.resize_(ours, (320, 256))
        assert not any(c.name == "attn_mask" for c in plan)
        assert_equal(ours, theirs, (160, 224))


def test_v2_from_scratch_says_that_its_bias_stretches():
    """Coordinates normalised by the window itself are noted when the window changes; pretrained ones are not."""
    scratch = small(V2, device="meta")
    finetuned = small("swinv2_base_window12to16_192to256", device="meta")
    assert any("pretrained_window_size" in note for note in timm_resize.plan_resize(scratch, 512).notes)
    assert not timm_resize.plan_resize(scratch, 512, window_policy="keep").notes
    assert not timm_resize.plan_resize(finetuned, 512).notes


# -- half precision, wrappers, truncated models ----------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_buffers_equal_a_fresh_build(name, dtype):
    """Buffers rebuilt in half precision are those of a model that stock builds there in half precision."""
    ours, theirs = small(name, dtype=dtype), small(name, dtype=dtype, img_size=(320, 288))
    request = make_request(type(ours).__name__, (320, 288), constructing=True)
    timm_resize.core.apply.apply_plan(ours, plan_request(ours, request))
    assert_same_structure(ours, theirs)


@pytest.mark.parametrize(
    ("name", "out_indices"),
    [
        pytest.param(name, out_indices, marks=[pytest.mark.slow] * ((at + some) % 2))
        for at, name in enumerate((*ALL, "swinv2_tiny_window16_256", "swin_s3_tiny_224"))
        for some, out_indices in enumerate(((0, 1, 2, 3), (1, 2)))
    ],
)
def test_feature_extractors_equal_stock(name, out_indices):
    """`features_only=True, img_size=` gives stock's extractor, features included, with all stages or some."""
    state = redraw_(stock(name, **SMALL)).state_dict()
    for size in ((256, 320), (448, 224)):
        ours, theirs = both(name, {name: state}, img_size=size, features_only=True, out_indices=out_indices)
        assert_close(ours, theirs)
        assert_same_structure(ours, theirs)
        with torch.inference_mode():
            for a, b in zip(ours(image(size)), theirs(image(size)), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_resizing_a_feature_extractor_equals_resizing_its_model(name, weights):
    """Stock wrappers cannot be resized: features equal the intermediates of the model that stock resized."""
    ours, native = small(name, features_only=True, out_indices=(0, 2)), trained(name, weights)
    flat = {k.replace(".", "_", 1) if k.startswith(("layers", "stages")) else k: v for k, v in weights[name].items()}
    assert not ours.load_state_dict(flat, strict=False).missing_keys
    before = {n: t.clone() for n, t in tensors(ours).items()}
    for size, options in (((160, 128), {}), ((128, 224), {}), ((96, 128), {"window_size": (4, 4, (8, 4), 4)})):
        theirs = copy.deepcopy(native)
        theirs.set_input_size(img_size=size, **options)
        timm_resize.resize_(ours, size, **options)
        with torch.inference_mode():
            wanted = theirs.forward_intermediates(image(size), indices=[0, 2], intermediates_only=True)
            for a, b in zip(ours(image(size)), wanted, strict=True):
                a = a if a.shape == b.shape else a.permute(0, 3, 1, 2)  # v1 and v2 wrappers give NHWC
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    timm_resize.resize_(ours, native.patch_embed.img_size, window_size=windows_of(native))
    assert all(torch.equal(t, tensors(ours)[n]) for n, t in before.items())


def test_a_feature_extractor_takes_a_patch_size():
    """The reductions of a wrapper's `feature_info` follow its patch size."""
    model = small(V1, features_only=True, device="meta")
    timm_resize.resize_(model, 448, patch_size=8)
    assert model.feature_info.reduction() == [8, 16, 32, 64]
    assert find_model(model).patch_embed.grid_size == (56, 56)


@pytest.mark.parametrize("name", ALL)
def test_truncated_models_resize_as_in_stock(name, weights):
    """After `prune_intermediate_layers` the rest is resized as stock does it, and the record still rebuilds."""
    ours = trained(name, weights)
    ours.prune_intermediate_layers([1])
    theirs = copy.deepcopy(ours)
    theirs.set_input_size(img_size=(320, 256), window_size=5)
    timm_resize.resize_(ours, (320, 256), window_size=5)
    assert_equal(ours, theirs, (320, 256))
    rebuilt = stock(name, **{**SMALL, **ours._model_args, "device": "meta"})  # stock's record lacks two windows
    assert windows_of(rebuilt)[:2] == windows_of(ours)


@pytest.mark.parametrize("name", mostly_slow(ALL, CR))
def test_scripting_after_a_resize(name, weights):
    """A resized model scripts, and the script gives what the model gives."""
    model = trained(name, weights)
    timm_resize.resize_(model, (96, 160), window_size=5)
    scripted = torch.jit.script(model)
    with torch.inference_mode():
        x = image((96, 160))
        torch.testing.assert_close(scripted(x), model(x), atol=1e-5, rtol=1e-5)
