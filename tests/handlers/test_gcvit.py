"""GlobalContextVit, which stock cannot resize: against fresh stock builds that get the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import resize_rel_pos_bias_table
from torch import nn

import timm_resize
from tests.helpers.oracle import assert_close, assert_same_structure, image, redraw_, stock

NAME = "gcvit_xxtiny"
TINY = {"embed_dim": 16, "num_classes": 3}
SIZES = [(256, 256), (160, 160), (288, 224), (192, 320)]


def fresh(model: nn.Module, size: tuple[int, int], **kwargs) -> nn.Module:
    """Build at `size` with stock, and fill in the weights of `model`, each table through timm's own function."""
    theirs = stock(NAME, img_size=size, **{**TINY, **kwargs})
    state = dict(model.state_dict())
    for key, table in theirs.state_dict().items():
        if key.endswith("relative_position_bias_table"):
            owner = key.rpartition(".")[0]
            state[key] = resize_rel_pos_bias_table(
                state[key],
                new_window_size=theirs.get_submodule(owner).window_size,
                new_bias_shape=tuple(table.shape),
                old_window_size=model.get_submodule(owner).window_size,
            )
    theirs.load_state_dict(state)
    return theirs


@pytest.fixture(scope="module")
def model():
    """A redrawn small model at 224 px."""
    return redraw_(stock(NAME, **TINY))


@pytest.mark.parametrize("size", SIZES)
def test_every_stage_equals_a_fresh_build(model, size):
    """Structure, weights, each stage's map and the output are those of stock built there with resized tables."""
    ours, theirs = copy.deepcopy(model), fresh(model, size)
    timm_resize.resize_(ours, size)
    assert_same_structure(ours, theirs)
    assert_close(ours, theirs)
    with torch.inference_mode():
        got, want = (m.forward_intermediates(image(size), intermediates_only=True) for m in (ours, theirs))
        assert len(got) == 4
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(image(size)), theirs(image(size)), atol=1e-4, rtol=1e-4)


def test_windows_are_fractions_of_the_image(model):
    """Windows are the image over 32, 32, 16 and 32, which is what each stage's global query pools to."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, (288, 352))
    windows = [tuple(stage.blocks[0].window_size) for stage in ours.stages]
    assert windows == [(9, 11), (9, 11), (18, 22), (9, 11)]
    x = torch.zeros(1, 3, 288, 352)
    with torch.inference_mode():
        x = ours.stem(x)
        for stage, window in zip(ours.stages, windows, strict=True):
            assert tuple(stage.global_block(stage.downsample(x)).shape[-2:]) == window
            x = stage(x)


def test_other_window_ratios_keep_their_pooling():
    """A model built with other windows keeps their fraction, as stock built so at the new size."""
    ratios = {"window_ratio": (16, 32, 32, 32)}
    native = redraw_(stock(NAME, **TINY, **ratios))
    ours, theirs = copy.deepcopy(native), fresh(native, (256, 192), **ratios)
    timm_resize.resize_(ours, (256, 192))
    assert_same_structure(ours, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image((256, 192))), theirs(image((256, 192))), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0, 1)])
def test_features_only_equals_stock(model, indices):
    """A feature wrapper, whole or cut short, resizes like the model that it was made from."""
    ours = stock(NAME, features_only=True, out_indices=indices, **TINY)
    ours.load_state_dict({k.replace("stages.", "stages_", 1): v for k, v in model.state_dict().items()}, strict=False)
    timm_resize.resize_(ours, (160, 288))
    theirs = fresh(model, (160, 288))
    with torch.inference_mode():
        want = theirs.forward_intermediates(image((160, 288)), indices=list(indices), intermediates_only=True)
        for a, b in zip(ours(image((160, 288))), want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [230, 240, 250, 272, (256, 230), (230, 256)])
def test_other_sizes_are_refused_with_the_nearest(model, size):
    """Sides that are no multiple of 32 are refused with the numbers; each valid neighbour is named."""
    height, width = size if isinstance(size, tuple) else (size, size)
    with pytest.raises(timm_resize.InvalidSizeError, match="is not divisible by 32, the pixels per token"):
        timm_resize.plan_resize(model, size)
    near = timm_resize.nearest_sizes(model, size)
    assert len(near) == 2
    for h, w in near:
        assert h % 32 == w % 32 == 0
        assert max(abs(h - height), abs(w - width)) < 32


def test_error_texts(model):
    """The refusal reads as the contract has it; below 32 px there is one valid neighbour."""
    with pytest.raises(timm_resize.InvalidSizeError) as refused:
        timm_resize.plan_resize(model, 230)
    assert str(refused.value) == (
        "GlobalContextVit: img_size=(230, 230) is not divisible by 32, the pixels per token of stage 1's global query. "
        "Use 224 or 256."
    )
    with pytest.raises(timm_resize.InvalidSizeError, match=r"Use 32\.$"):
        timm_resize.plan_resize(model, 16)


def test_windows_can_be_named_but_not_chosen(model):
    """The windows that follow from the weights are accepted; others are refused with the right ones."""
    right = ((8, 8), (8, 8), (16, 16), (8, 8))
    assert timm_resize.plan_resize(model, 256, window_size=right)
    with pytest.raises(timm_resize.ResizeError, match=r"Use window_size=\(\(8, 8\), \(8, 8\), \(16, 16\), \(8, 8\)\)"):
        timm_resize.plan_resize(model, 256, window_size=7)
    with pytest.raises(timm_resize.InvalidSizeError, match=r"against window_policy='keep'. Use 224\."):
        timm_resize.plan_resize(model, 256, window_policy="keep")


def test_windows_given_to_the_constructor_are_recorded():
    """A model built with explicit windows rebuilds in stock from its recorded arguments after a resize."""
    ours = redraw_(stock(NAME, window_size=(7, 7, 14, 7), **TINY))
    timm_resize.resize_(ours, (192, 256))
    assert ours._model_args["window_size"] == ((6, 8), (6, 8), (12, 16), (6, 8))
    theirs = stock(NAME, **ours._model_args)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        assert torch.equal(ours(image((192, 256))), theirs(image((192, 256))))
