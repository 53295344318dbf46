"""MaxxVit (CoAtNet, MaxViT, MaxxViT, parallel) against stock's `set_input_size` and fresh stock builds."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from safetensors.torch import save_file
from timm.models.maxxvit import MaxxVit
from torch import nn

import timm_resize
from tests.helpers.examples import mostly_slow
from tests.helpers.oracle import assert_close, assert_same_structure, image, redraw_, stock
from timm_resize.core.registry import handler_for

MAXVIT = "maxvit_pico_rw_256"
TF = "maxvit_tiny_tf_224"
PARALLEL = "maxvit_tiny_pm_256"
COATNET = "coatnet_pico_rw_224"
POOLED = "coatnet_nano_rw_224"
WINDOWED = [MAXVIT, TF, PARALLEL, "maxvit_rmlp_pico_rw_256", "maxxvit_rmlp_nano_rw_256", "maxxvitv2_nano_rw_256"]
TYPICAL = [COATNET, MAXVIT, "maxxvitv2_nano_rw_256"]
"""Attention over whole maps, in windows, and with ConvNeXt's blocks."""
EXAMPLES = handler_for(MaxxVit).examples


def build(name: str, **kwargs) -> nn.Module:
    """Build an example with stock, shrunk."""
    return stock(name, **{"num_classes": 3, **EXAMPLES[name], **kwargs})


def save(model: nn.Module, folder) -> dict:
    """Save a checkpoint; return the keywords by which create_model reads it."""
    path = folder / "model.safetensors"
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 3}, "num_classes": 3}


def outputs(model: nn.Module, size: tuple[int, int]) -> torch.Tensor:
    """Run a model on a seeded image."""
    with torch.inference_mode():
        return model(image(size))


def assert_equals_stock(ours: nn.Module, theirs: nn.Module, size: tuple[int, int]) -> None:
    """Same structure, records, tensors and outputs."""
    assert_same_structure(ours, theirs)
    assert_close(ours, theirs)
    assert ours._model_args == theirs._model_args
    assert ours._traits == theirs._traits
    torch.testing.assert_close(outputs(ours, size), outputs(theirs, size), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", mostly_slow([COATNET, "coatnet_nano_cc_224", "coatnet_rmlp_nano_rw_224", *WINDOWED], *TYPICAL)
)
def test_every_stage_equals_stock(name):
    """Each stage's map equals stock's after its `set_input_size`, for H>W and W>H."""
    model = redraw_(build(name))
    for size in ((192, 128), (160, 288)):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        theirs.set_input_size(size)
        timm_resize.resize_(ours, size)
        with torch.inference_mode():
            got, want = (m.forward_intermediates(image(size), intermediates_only=True) for m in (ours, theirs))
        assert len(got) == 5
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3, 4), (1, 2, 3)])
@pytest.mark.parametrize("name", mostly_slow([COATNET, TF, "maxxvitv2_nano_rw_256"], COATNET))
def test_features_only_equals_stock(name, indices, tmp_path):
    """A wrapper built at the size, and one resized to it, whole or cut short, equal stock's built there."""
    args = {**save(redraw_(build(name)), tmp_path), "features_only": True, "out_indices": indices, **EXAMPLES[name]}
    native = (224, 224) if "224" in name else (256, 256)
    for size in ((192, 288), (320, 320)):
        theirs = stock(name, img_size=size, **args)
        built = timm_resize.create_model(name, img_size=size, **args).eval()
        resized = stock(name, **args)
        assert timm_resize.resize_(resized, size).old_size == native
        with torch.inference_mode():
            want = theirs(image(size))
            for ours in (built, resized):
                assert ours._traits == theirs._traits
                for a, b in zip(ours(image(size)), want, strict=True):
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# -- partitions ----------------------------------------------------------------------------------

ASKED = [
    {"img_size": (512, 512), "window_size": (8, 8)},
    {"img_size": (512, 512), "window_size": (8, 8), "grid_size": (4, 4)},
    {"img_size": (256, 128), "grid_size": (8, 4)},
    {"img_size": (512, 256), "partition_ratio": 64},
    {"window_size": (4, 4), "grid_size": (4, 4)},
]


@pytest.mark.parametrize("options", ASKED, ids=str)
@pytest.mark.parametrize("name", mostly_slow([MAXVIT, "maxvit_rmlp_pico_rw_256", "maxxvitv2_nano_rw_256"], MAXVIT))
def test_options_equal_stock(name, options):
    """window_size, grid_size and partition_ratio do and record what they do in stock's `set_input_size`."""
    model = redraw_(build(name))
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    theirs.set_input_size(**options)
    timm_resize.resize_(ours, options.get("img_size"), **{k: v for k, v in options.items() if k != "img_size"})
    assert_equals_stock(ours, theirs, options.get("img_size", (256, 256)))


@pytest.mark.parametrize("name", mostly_slow(WINDOWED, MAXVIT, "maxxvitv2_nano_rw_256"))
def test_keep_holds_the_partition_and_rebuilds_in_stock(name):
    """window_policy='keep' changes no tensor at a multiple of the native size; stock rebuilds it from the record."""
    ours = redraw_(build(name))
    size = tuple(2 * s for s in ours.img_size)
    assert not timm_resize.plan_resize(ours, size, window_policy="keep").tensors
    timm_resize.resize_(ours, size, window_policy="keep")
    theirs = stock(name, **ours._model_args)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(outputs(ours, size), outputs(theirs, size))
    with pytest.raises(timm_resize.InvalidSizeError, match="not divisible by"):
        timm_resize.plan_resize(ours, 320, window_policy="keep")


@pytest.mark.parametrize("name", [MAXVIT, TF, COATNET])
def test_a_resized_model_rebuilds_in_stock(name):
    """Stock builds the resized model from the recorded arguments and loads its weights."""
    ours = redraw_(build(name))
    timm_resize.resize_(ours, (192, 320))
    theirs = stock(name, **ours._model_args)
    theirs.load_state_dict(ours.state_dict())
    assert_same_structure(ours, theirs)
    assert torch.equal(outputs(ours, (192, 320)), outputs(theirs, (192, 320)))


def test_a_window_of_the_constructor_is_kept(tmp_path):
    """With transformer_window_size other than the image gives, `create_model` keeps it, as stock's constructor does."""
    window = {**EXAMPLES[MAXVIT], "transformer_window_size": (4, 4), "img_size": (384, 256)}
    args = save(redraw_(build(MAXVIT, transformer_window_size=(4, 4))), tmp_path)
    ours, theirs = timm_resize.create_model(MAXVIT, **window, **args).eval(), stock(MAXVIT, **window, **args)
    assert_same_structure(ours, theirs)
    assert_close(ours, theirs)
    assert ours.stages[0].blocks[0].attn_grid.partition_size == (4, 4)
    torch.testing.assert_close(outputs(ours, (384, 256)), outputs(theirs, (384, 256)), atol=1e-5, rtol=1e-5)
    rebuilt = stock(MAXVIT, **ours._model_args)
    rebuilt.load_state_dict(ours.state_dict())
    assert torch.equal(outputs(rebuilt, (384, 256)), outputs(ours, (384, 256)))


def test_keep_at_construction_rebuilds_in_stock(tmp_path):
    """`create_model(img_size=512, window_policy='keep')` keeps the checkpoint's windows and records them."""
    native = redraw_(build(MAXVIT))
    args = save(native, tmp_path)
    ours = timm_resize.create_model(MAXVIT, img_size=512, window_policy="keep", **EXAMPLES[MAXVIT], **args).eval()
    for key, value in native.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    rebuilt = stock(MAXVIT, **ours._model_args)
    rebuilt.load_state_dict(ours.state_dict())
    assert torch.equal(outputs(rebuilt, (512, 512)), outputs(ours, (512, 512)))


def test_parallel_blocks_have_one_partition():
    """In the parallel variant either option sets both attentions (stock asserts); two different ones are refused."""
    for option in ("window_size", "grid_size"):
        ours, theirs = redraw_(build(PARALLEL)), redraw_(build(PARALLEL))
        theirs.set_input_size((512, 256), window_size=(4, 8), grid_size=(4, 8))
        timm_resize.resize_(ours, (512, 256), **{option: (4, 8)})
        assert_equals_stock(ours, theirs, (512, 256))
        with pytest.raises(AssertionError):
            theirs.set_input_size((512, 256), **{option: (8, 8)})
    with pytest.raises(timm_resize.ResizeError, match="window_size=8 is not grid_size=4: parallel blocks have one"):
        timm_resize.plan_resize(build(PARALLEL, device="meta"), 512, window_size=8, grid_size=4)


def test_options_without_effect_are_noted():
    """CoAtNet has no partitions: stock records them all the same, and the plan says that they do nothing."""
    plan = timm_resize.plan_resize(build(COATNET, device="meta"), 256, window_size=4)
    assert any("attends over whole maps" in note for note in plan.notes)
    assert not timm_resize.plan_resize(build(COATNET, device="meta"), 256).notes


@pytest.mark.parametrize("ratio", [0, -1, 2.0, True, "32"])
def test_a_ratio_that_is_no_positive_int_is_refused(ratio):
    """partition_ratio must be a whole number of pixels per partition cell."""
    with pytest.raises(timm_resize.ResizeError, match=r"is not a positive int. Use partition_ratio=32\."):
        timm_resize.plan_resize(build(MAXVIT, device="meta"), 256, partition_ratio=ratio)


# -- sizes ---------------------------------------------------------------------------------------


REFUSED = [
    (TF, 230, "gives a 58x58 stage-1 grid, not divisible by window_size=7. Use 224 or 256."),
    (MAXVIT, 230, "gives a 58x58 stage-1 grid, not divisible by window_size=7. Use 224 or 256."),
    (PARALLEL, 240, "gives a 60x60 stage-1 grid, not divisible by window_size=7. Use 224 or 256."),
    (TF, (272, 256), "gives a 68x64 stage-1 grid, not divisible by window_size=8. Use (256, 256) or (288, 256)."),
    ("maxxvitv2_nano_rw_256", 240, "gives a 60x60 stage-1 grid, not divisible by grid_size=7. Use 224 or 256."),
    (
        MAXVIT,
        250,
        "gives an odd 125x125 map before stage 1, whose two branches then differ: 63x63 and 62x62. Use 224 or 256.",
    ),
    (TF, 16, "is smaller than partition_ratio=32. Use 32."),
    (MAXVIT, 16, "leaves nothing of a 1x1 map in stage 4. Use 32."),
]


@pytest.mark.parametrize(("name", "size", "text"), REFUSED)
def test_error_texts(name, size, text):
    """Refusals give the numbers of the first thing that breaks and the nearest sizes that work."""
    with pytest.raises(timm_resize.InvalidSizeError) as refused:
        timm_resize.plan_resize(build(name, device="meta"), size)
    pair = size if isinstance(size, tuple) else (size, size)
    assert str(refused.value) == f"MaxxVit: img_size={pair} {text}"


SWEEP = [(s, s) for s in (16, 31, 33, 48, 63, 96, 112, 127, 128, 129, 144, 230, 256)]
SWEEP += [(96, 64), (128, 112), (95, 64), (33, 96)]


@pytest.mark.parametrize("name", mostly_slow([COATNET, POOLED, "coatnet_rmlp_1_rw_224", MAXVIT, TF], COATNET, MAXVIT))
def test_what_is_accepted_runs_and_what_stock_runs_is_accepted(name):
    """Every accepted size passes forward; every refused one breaks stock, or has it broadcast a one-cell shortcut."""
    ours, refusals = build(name, device="meta"), {}
    for size in SWEEP:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                timm_resize.resize_(ours, size)
            except timm_resize.InvalidSizeError as error:
                refusals[size] = str(error)
            else:
                ours(torch.empty(1, 3, *size, device="meta"))
    assert not refusals.keys() & {(256, 256), (96, 96), (96, 64)}
    assert refusals.keys() & {(16, 16), (33, 96), (95, 64)}
    for size, refusal in refusals.items():
        assert not stock_runs(ours, size) or broadcasts(refusal), (size, refusal)


def stock_runs(model: nn.Module, size: tuple[int, int]) -> bool:
    """Whether a copy of a model passes forward after stock's `set_input_size`."""
    theirs = copy.deepcopy(model)
    try:
        theirs.set_input_size(size)
        theirs(torch.empty(1, 3, *size, device="meta"))
    except (RuntimeError, AssertionError, ZeroDivisionError):
        return False
    return True


def broadcasts(refusal: str) -> bool:
    """Whether a refusal names a shortcut of one row or column that broadcasts over the other branch."""
    found = re.search(r"differ: (\d+)x(\d+) and (\d+)x(\d+)\.", refusal)
    assert found is not None
    height, width, short_h, short_w = map(int, found.groups())
    return all(short in (1, side) for side, short in ((height, short_h), (width, short_w)))


@pytest.mark.parametrize("size", [(48, 48), (64, 48)])
def test_a_broadcast_shortcut_is_refused(size):
    """Stock runs MaxViT at 48 px only because a one-cell shortcut broadcasts over two cells: refused."""
    model = redraw_(build(MAXVIT))
    with pytest.raises(timm_resize.InvalidSizeError, match="whose two branches then differ"):
        timm_resize.plan_resize(model, size)
    model.set_input_size(size)
    block, seen = model.stages[3].blocks[0].conv, {}
    block.shortcut.register_forward_hook(lambda m, i, out: seen.update(shortcut=out.shape[-1]))
    block.conv3_1x1.register_forward_hook(lambda m, i, out: seen.update(main=out.shape[-1]))
    outputs(model, size)
    assert seen == {"shortcut": 1, "main": 2}


def test_odd_maps_follow_forward_not_the_constructor():
    """At 240 px stock's CoAtNet expects 8x8 cells in stage 4 and gets 7x7; ours has 7x7 tables and drops 16 px."""
    native = redraw_(build(COATNET))
    theirs = copy.deepcopy(native)
    theirs.set_input_size((240, 240))
    with pytest.raises(RuntimeError):
        outputs(theirs, (240, 240))
    ours = copy.deepcopy(native)
    with pytest.warns(UserWarning, match="drops 16 rows and 16 columns of pixels") as caught:
        timm_resize.resize_(ours, (240, 240))
    assert len(caught) == 1
    for block, original in zip(theirs.stages[3].blocks, native.stages[3].blocks, strict=True):
        block.attn.rel_pos = copy.deepcopy(original.attn.rel_pos)  # 7x7 natively
    torch.testing.assert_close(outputs(ours, (240, 240)), outputs(theirs, (240, 240)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [230, 240])
def test_a_constructor_with_the_wrong_maps_is_repaired(size):
    """`create_model` gives a CoAtNet that runs where stock's constructor builds one that cannot."""
    with pytest.raises(RuntimeError):
        outputs(build(POOLED, img_size=size), (size, size))
    with pytest.warns(UserWarning, match="drops"):
        ours = timm_resize.create_model(POOLED, img_size=size, num_classes=3, **EXAMPLES[POOLED]).eval()
    assert outputs(ours, (size, size)).shape == (1, 3)
    assert ours.stages[3].blocks[0].attn.rel_pos.window_size == (7, 7)
