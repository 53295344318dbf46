"""NesT: the position embedding is one map cut into blocks; the hierarchy of blocks stays."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from timm.models._manipulate import checkpoint_seq
from timm.models.nest import NestLevel, blockify, resize_pos_embed

import timm_resize
import timm_resize.core.transaction
import timm_resize.handlers.nest
from tests.helpers.oracle import assert_same_structure, image, redraw_, stock, tensors
from tests.helpers.transposed import transposed
from timm_resize.handlers.nest import Blocked, RectangularNestLevel
from timm_resize.resample import pos_embed_map

SMALL = {"mlp_ratio": 0.5, "num_classes": 3}


@pytest.fixture(scope="module")
def model():
    """A redrawn nest_tiny at 224: 4x4, 2x2 and 1 blocks of 14x14."""
    return redraw_(stock("nest_tiny", **SMALL))


def blocked(old: tuple[int, int], new: tuple[int, int], blocks: int) -> Blocked:
    return Blocked(pos_embed_map(old, new, dim=1, antialias=False).axes, dim=1, blocks=blocks)


@pytest.mark.parametrize("blocks", [4, 2, 1])
@pytest.mark.parametrize("block", [20, 9])
def test_square_maps_equal_stock_own_function(blocks, block):
    """Stock has the right resize in its file, though its loader looks for a key that no model has."""
    table = torch.randn(1, blocks**2, 14 * 14, 5, generator=torch.Generator().manual_seed(0))
    want = resize_pos_embed(table, torch.empty(1, blocks**2, block * block, 5))
    got = blocked((14 * blocks,) * 2, (block * blocks,) * 2, blocks)(table)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("new", [(80, 80), (40, 72), (64, 36)])
def test_a_smooth_function_of_the_place_is_read_back_across_blocks(new):
    """Samples of f over the whole 56x56 map, cut into 4x4 blocks, become samples of f over the new map, cut again."""

    def f(size: tuple[int, int]) -> torch.Tensor:
        y, x = ((torch.arange(n) + 0.5) / n for n in size)
        return torch.cos(math.pi * y)[:, None] + torch.cos(2 * math.pi * x)

    def cut(a: torch.Tensor) -> torch.Tensor:
        h, w = a.shape[0] // 4, a.shape[1] // 4
        rows = [a[i * h : (i + 1) * h, j * w : (j + 1) * w].flatten() for i in range(4) for j in range(4)]
        return torch.stack(rows)[None, :, :, None]

    table = cut(f((56, 56)))
    assert torch.equal(table, blockify(f((56, 56))[None, :, :, None], 14))  # the test's cut is stock's
    torch.testing.assert_close(blocked((56, 56), new, 4)(table), cut(f(new)), atol=0.02, rtol=0)


def test_forward_for_rectangles_equals_stock_on_squares(model):
    """The same level, run by stock's forward and by ours, on square blocks."""
    level, duplicate = model.levels[1], copy.deepcopy(model.levels[1])
    duplicate.__class__, duplicate.block_size = RectangularNestLevel, (14, 14)
    x = torch.randn(1, 96, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(duplicate(x), level(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(320, 192), (192, 320)])
def test_transposed_images_give_the_same_logits(model, size):
    """H > W and W > H: with kernels and tables transposed, the transposed image gives the same logits."""
    ours, theirs = copy.deepcopy(model), transposed(model)
    for level in theirs.levels:
        side = math.isqrt(level.pos_embed.shape[1])
        table = level.pos_embed.data.reshape(1, side, side, 14, 14, -1).permute(0, 2, 1, 4, 3, 5)
        level.pos_embed.data = table.reshape(level.pos_embed.shape).contiguous()
    timm_resize.resize_(ours, size)
    timm_resize.resize_(theirs, size[::-1])
    with torch.inference_mode():
        x = image(size)
        torch.testing.assert_close(ours(x), theirs(x.transpose(-1, -2)), atol=1e-4, rtol=1e-4)


def test_back_to_a_square_restores_stock_class_and_every_bit(model):
    """224 to 320x192 and back: stock's forward again, nothing left of the detour."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, (320, 192))
    assert {type(level) for level in ours.levels} == {RectangularNestLevel}
    assert ours.block_size == (20, 12)
    timm_resize.resize_(ours, 224)
    assert {type(level) for level in ours.levels} == {NestLevel}
    assert_same_structure(ours, model)
    assert all(torch.equal(t, tensors(ours)[n]) for n, t in tensors(model).items())


def test_a_rectangular_model_copies_pickles_and_loads(model, tmp_path):
    """deepcopy and torch.save carry it; a fresh one of the same size loads its state dict."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, (192, 256))
    torch.save(ours, tmp_path / "model.pt")
    fresh = timm_resize.create_model("nest_tiny", img_size=(192, 256), **SMALL).eval()
    fresh.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        x = image((192, 256))
        for duplicate in (copy.deepcopy(ours), torch.load(tmp_path / "model.pt", weights_only=False), fresh):
            torch.testing.assert_close(duplicate(x), ours(x), atol=0, rtol=0)


def test_a_rectangular_model_is_scripted():
    """torch.jit.script compiles the forward that knows both sides."""
    wide = redraw_(timm_resize.create_model("nest_tiny", img_size=(64, 96), mlp_ratio=0.5)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(wide)(image((64, 96))), wide(image((64, 96))))


def test_a_failing_write_puts_stock_class_back(model, monkeypatch):
    """An exception while a model becomes rectangular leaves stock's class and forward."""
    ours, write, left = copy.deepcopy(model), timm_resize.core.transaction._write, [8]

    def failing(do):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("injected")
        write(do)

    monkeypatch.setattr(timm_resize.core.transaction, "_write", failing)
    with pytest.raises(RuntimeError, match="injected"):
        timm_resize.resize_(ours, (320, 192))
    assert {type(level) for level in ours.levels} == {NestLevel}
    assert_same_structure(ours, model)


def test_levels_are_resampled_as_stock_would(model):
    """A shrunk level's table is stock's own resize of it, whose kernel is not widened."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, 96)
    for level, before in zip(ours.levels, model.levels, strict=True):
        want = resize_pos_embed(before.pos_embed, level.pos_embed)
        torch.testing.assert_close(level.pos_embed, want, atol=1e-5, rtol=0)


def test_checkpointed_training_of_a_rectangular_model(model, monkeypatch):
    """Gradients reach every resized table, also through gradient checkpointing, with the same values."""
    checkpointed = []

    def recorded(blocks, x):
        checkpointed.append(blocks)
        return checkpoint_seq(blocks, x)

    monkeypatch.setattr(timm_resize.handlers.nest, "checkpoint_seq", recorded)
    plain = copy.deepcopy(model)
    timm_resize.resize_(plain, (64, 96))
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for m in (plain, saving):
        assert not checkpointed
        m(image((64, 96))).square().mean().backward()
    assert len(checkpointed) == len(saving.levels)
    for a, b in zip(plain.levels, saving.levels, strict=True):
        assert a.pos_embed.grad.abs().sum() > 0
        torch.testing.assert_close(a.pos_embed.grad, b.pos_embed.grad)


@pytest.mark.parametrize("size", [230, 250, 8, (224, 232)])
def test_grids_that_do_not_divide_into_blocks_are_refused(model, size):
    """The first level has 4x4 blocks of whole patches at every size."""
    with pytest.raises(timm_resize.InvalidSizeError, match="not divisible into 4x4 blocks"):
        timm_resize.plan_resize(model, size)


@pytest.mark.parametrize("indices", [(0, 1, 2), (1,)])
def test_features_equal_those_of_a_stock_feature_model_at_the_size(indices):
    """features_only, also with levels cut off: same maps as stock's wrapper at the new size with these weights."""
    kwargs = {"features_only": True, "out_indices": indices, "mlp_ratio": 0.5}
    ours = redraw_(stock("nest_tiny", **kwargs))
    timm_resize.resize_(ours, 160)
    theirs = stock("nest_tiny", img_size=160, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        x = image((160, 160))
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b)
