"""`infer`: classes that nobody taught, resized by what their builds show. Oracles: a build at the new size for shapes,
buffers and attributes; timm's functions and hand formulas for values."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc, resize_rel_pos_bias_table
from torch import nn

import timm_resize
from tests.builds import nets
from tests.helpers.oracle import assert_same_structure
from timm_resize.errors import InvalidSizeError, ResizeError, UnsupportedModelError
from timm_resize.resample import flatten_linear, offset_table, token_matrix, token_reader, token_writer

OLD, WIDE = (224, 224), (208, 304)


@pytest.fixture(autouse=True)
def _registry_as_before():
    with timm_resize.registry.override():
        yield


def resized(model, size, **options):
    """Return a resized copy."""
    out = copy.deepcopy(model)
    timm_resize.resize_(out, size, **options)
    return out


def test_positions_and_the_table_that_is_printed():
    """A position embedding goes through timm's own resampling, class token kept; the rest is as in a fresh build."""
    found = timm_resize.infer(nets.Plain)
    assert "pos_embed  parameter  1x197x8 -> 1x193x8  h*w + 1, h = H // 16, w = W // 16  positions, prefix 1" in str(
        found
    )
    model = nets.Plain(OLD)
    got = resized(model, WIDE)
    assert_same_structure(got, nets.Plain(WIDE))
    want = resample_abs_pos_embed(model.pos_embed, new_size=[13, 19], old_size=[14, 14], num_prefix_tokens=1)
    assert torch.allclose(got.pos_embed, want, atol=1e-6)
    assert torch.equal(got.proj.weight, model.proj.weight)
    assert got(torch.zeros(1, 3, *WIDE)).shape == (1, 3)


def test_everything_that_hides():
    """Two grids, a table with a suffix, token matrices, a window that follows, buffers by value or None, a list."""
    timm_resize.infer(nets.Hidden)
    model = nets.Hidden(OLD)
    noise = model.noise.clone()
    got, fresh = resized(model, WIDE), nets.Hidden(WIDE)
    fresh.noise.copy_(noise)  # random, so it is not of the size
    fresh.resized_img_size = WIDE  # where nothing else tells the size
    assert_same_structure(got, fresh)
    grid, coarse, window, pooled = (26, 38), (13, 19), (6, 9), (6, 9)
    assert torch.allclose(got.fine, resample_abs_pos_embed_nhwc(model.fine, list(grid)), atol=1e-6)
    nhwc = resample_abs_pos_embed_nhwc(model.coarse.permute(0, 2, 3, 1), list(coarse)).permute(0, 3, 1, 2)
    assert torch.allclose(got.coarse, nhwc, atol=1e-6)
    table = resize_rel_pos_bias_table(model.bias.rel[:-3].detach(), coarse, (25 * 37, 2))
    assert torch.allclose(got.bias.rel[:-3], table, atol=1e-5)
    assert torch.equal(got.bias.rel[-3:], model.bias.rel[-3:])
    local = resize_rel_pos_bias_table(model.local.detach(), window, (11 * 17, 2))
    assert torch.allclose(got.local, local, atol=1e-5)
    was, now = model.mixing, got.mixing
    assert torch.equal(now.mix.weight, token_matrix((14, 14), coarse)(was.mix.weight))
    assert torch.equal(now.mix.bias, token_writer((14, 14), coarse)(was.mix.bias))
    assert torch.equal(now.fc1.weight, token_reader((14, 14), coarse)(was.fc1.weight))
    written = token_writer((7, 7), pooled)(was.keys.weight)
    assert torch.allclose(now.keys.weight, token_reader((14, 14), coarse)(written), atol=1e-6)
    assert got(torch.zeros(1, 3, *WIDE)).isfinite().all()
    timm_resize.resize_(got, OLD)
    assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), model.state_dict().values(), strict=True))


def test_one_axis_and_patches_that_are_not_square():
    """Rows and columns have an embedding each; `nn.Embedding` records how many rows it has."""
    timm_resize.infer(nets.Axial)
    model = nets.Axial(OLD)
    got = resized(model, WIDE)
    fresh = nets.Axial(WIDE)
    fresh.resized_img_size = WIDE
    assert_same_structure(got, fresh)
    rows = resample_abs_pos_embed_nhwc(model.rows.weight[None, :, None], [13, 1])[0, :, 0]
    assert torch.allclose(got.rows.weight, rows, atol=1e-5)
    flat = resample_abs_pos_embed(model.flat[None], [13, 38], [14, 28], 0)[0]
    assert torch.allclose(got.flat, flat, atol=1e-6)


def test_what_shapes_do_not_say_is_asked_for():
    """A flattened map has its channels first or last: the refusal says which hint to give, and that hint does."""
    with pytest.raises(UnsupportedModelError, match=r"hints=\{'head.weight': 'flatten' or 'flatten:last'\}"):
        timm_resize.infer(nets.Flatten)
    timm_resize.infer(nets.Flatten, hints={"head.*": "flatten"})
    model = nets.Flatten(OLD)
    got = resized(model, WIDE)
    assert torch.equal(got.head.weight, flatten_linear((7, 7), (7, 10), channels=4)(model.head.weight))
    assert got.head.in_features == 4 * 7 * 10


@pytest.mark.parametrize(
    ("hints", "text"),
    [
        ({"pos_embed": "position"}, "Did you mean positions"),
        ({"pos_emb": "positions"}, "Did you mean pos_embed"),
        ({"proj.*": "positions"}, "matches no parameter that differs"),
        ({"pos_embed": "table"}, "does not fit"),
    ],
)
def test_hints_that_cannot_be_followed(hints, text):
    """An unknown word and a pattern that matches nothing name the nearest."""
    with pytest.raises(ResizeError, match=text):
        timm_resize.infer(nets.Plain, hints=hints)


def test_a_hint_turns_the_convention():
    """Rows beyond the grid are a prefix; the hint puts them last."""
    timm_resize.infer(nets.Plain, hints={"pos*": "positions:suffix"})
    model = nets.Plain(OLD)
    got = resized(model, WIDE)
    assert torch.equal(got.pos_embed[:, -1], model.pos_embed[:, -1])
    assert not torch.equal(got.pos_embed[:, 0], model.pos_embed[:, 0])


def test_each_configuration_wants_a_call():
    """A wider model of the class is refused until infer has seen its build; then both can be resized."""
    timm_resize.infer(nets.Plain)
    wider = nets.Plain(OLD, dim=12)
    with pytest.raises(UnsupportedModelError, match=r"is not as the build .* Call timm_resize.infer"):
        timm_resize.plan_resize(wider, WIDE)
    timm_resize.infer(lambda img_size: nets.Plain(img_size, dim=12))
    for model in (wider, nets.Plain(OLD), nets.Plain(OLD, classes=7)):
        assert resized(model, WIDE).pos_embed.shape[1] == 1 + 13 * 19


def test_nothing_depends_on_the_size():
    """A network that takes any size is accepted as it is, by a run without values."""
    found = timm_resize.infer(nets.AnySize)
    assert found.rows == ()
    assert not timm_resize.plan_resize(nets.AnySize(OLD), WIDE).tensors
    with pytest.raises(InvalidSizeError, match="does not run"):
        timm_resize.plan_resize(nets.AnySize(OLD), (2, 2))


class Odd(nn.Module):
    """Takes a function that adds what is odd to an image size's module."""

    def __init__(self, img_size, add):
        super().__init__()
        self.img_size = img_size
        self.pos = nn.Parameter(torch.zeros(1, nets.cells(nets.over(img_size, 16)), 4))
        self.proj = nn.Conv2d(3, 4, 16, 16)
        add(self, *nets.over(img_size, 16))

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2) + self.pos


def more_layers(net, h, w):
    net.more = nn.Sequential(*[nn.Linear(2, 2) for _ in range(h)])


def norm_over_tokens(net, h, w):
    net.norm = nn.BatchNorm1d(h * w)


def layer_norm_over_tokens(net, h, w):
    net.norm = nn.LayerNorm([h * w, 4])


def no_form(net, h, w):
    net.odd = nn.Parameter(torch.zeros(h * w % 13 + 1, 4))


def closure(net, h, w):
    net.cells = lambda x: x * h


def hidden_layer(net, h, w):
    net.hidden = [nn.Linear(h, w)]


def blocks_of_one_grid(net, h, w):
    net.blocks = nn.Parameter(torch.zeros(1, 4, h * w, 4))


def only_at_the_check(net, h, w):
    if (h, w) == (18, 12):  # the size that checks
        net.pos = nn.Parameter(torch.zeros(1, 7, 4))


def axis_offsets(net, h, w):
    net.rel_h = nn.Parameter(torch.zeros(2 * h - 1, 4))


class Unroll(nn.Module):
    def __init__(self, grid):
        super().__init__()
        self.grid = grid


def another_order(net, h, w):
    net.unroll = Unroll((h, w))


@pytest.mark.parametrize(
    ("add", "text"),
    [
        (more_layers, r"module more.\d+ is not the same"),
        (norm_over_tokens, "norm.running_mean is what a BatchNorm1d has learned"),
        (layer_norm_over_tokens, "norm.weight: it reads as .* no map is known"),
        (no_form, "odd: no closed form"),
        (closure, "cells holds a function made at the build"),
        (hidden_layer, r"hidden holds a module \(Linear\)"),
        (blocks_of_one_grid, "blocks: it reads as .* 'positions' or 'blocks'"),
        (only_at_the_check, "pos: .* does not foresee"),
        (axis_offsets, "rel_h: .* 'axis'"),
        (another_order, "pos: unroll, a Unroll .* another order"),
    ],
)
def test_refused_by_name(add, text):
    """What no form explains, what two do, and what no build can be the pattern of; nothing is registered then."""
    with pytest.raises(UnsupportedModelError, match=text):
        timm_resize.infer(lambda img_size: Odd(img_size, add))
    assert timm_resize.core.registry.handler_for(Odd) is None


class Cached(nn.Module):
    """LeViT's attention in little: a table over absolute offsets with its index, and a cache that eval fills."""

    def __init__(self, img_size):
        super().__init__()
        self.size = list(img_size)
        h, w = nets.over(img_size, 16)
        self.biases = nn.Parameter(torch.randn(2, h * w))
        down, right = ((torch.arange(n)[:, None] - torch.arange(n)).abs() for n in (h, w))
        self.register_buffer("index", (down[:, None, :, None] * w + right[None, :, None, :]).reshape(h * w, -1))
        self.proj, self.cache = nn.Conv2d(3, 4, 16, 16), {}

    def forward(self, x):
        if "bias" not in self.cache:
            self.cache["bias"] = self.biases.detach()[:, self.index].mean(0)
        x = self.proj(x).flatten(2)
        return x @ self.cache["bias"]


def test_offsets_by_their_index_and_a_cache():
    """An index beside a table says that it is over |dy|, |dx|; what forward has kept of the old size is dropped."""
    timm_resize.infer(Cached)
    model = Cached(OLD)
    model(torch.zeros(1, 3, *OLD))
    got = resized(model, WIDE)
    assert torch.equal(got.biases, offset_table((14, 14), (13, 19))(model.biases))
    assert_same_structure(got, Cached(WIDE))
    assert got(torch.zeros(1, 3, *WIDE)).shape == (1, 4, 13 * 19)


def test_a_buffer_that_training_changed_is_refused():
    """Values that are not the build's are no function of the size."""
    timm_resize.infer(nets.Hidden)
    model = nets.Hidden(OLD)
    model.scale.mul_(2)
    with pytest.raises(UnsupportedModelError, match="the buffer scale .* not those of the build"):
        timm_resize.plan_resize(model, WIDE)


def test_a_size_that_nothing_tells():
    """No attribute holds it, and it was not tried: the error says what to set, and a second resize knows it."""
    timm_resize.infer(nets.Hidden)
    model = nets.Hidden((160, 160))
    with pytest.raises(UnsupportedModelError, match=r"Set model.resized_img_size = \(H, W\)"):
        timm_resize.plan_resize(model, WIDE)
    model.resized_img_size = (160, 160)
    assert timm_resize.resize_(model, WIDE).old_size == (160, 160)
    assert timm_resize.plan_resize(model, OLD).old_size == WIDE


class Square(nn.Module):
    """Takes one side."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.proj = nn.Conv2d(3, 4, 16, 16)
        self.pos = nn.Parameter(torch.randn(1, (img_size // 16) ** 2, 4))

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2) + self.pos


def test_a_build_that_takes_one_side():
    """It is given ints, and a size that is not square is refused with the squares that are near."""
    timm_resize.infer(Square)
    model = Square(224)
    timm_resize.resize_(model, 288)
    assert model.img_size == 288
    assert model.pos.shape[1] == 18**2
    with pytest.raises(InvalidSizeError, match="is not square, and its build takes one side. Use 320"):
        timm_resize.plan_resize(model, (256, 320))


def test_too_few_sizes():
    """Fewer than four builds tell nothing; the text says why sizes were refused."""

    def build(img_size):
        if img_size not in (OLD, (192, 256)):
            raise ValueError("no")
        return nets.Plain(img_size)

    with pytest.raises(ResizeError, match=r"too few sizes.*ValueError: no.*Give sizes="):
        timm_resize.infer(build)


def test_only_told():
    """With register=False the class stays unknown, problems are in the table, and no random state has moved."""
    states = torch.get_rng_state(), random.getstate()
    found = timm_resize.infer(nets.Flatten, register=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert "problem: head.weight: it reads as 4*h*w" in str(found)
    assert not found.registered
    assert timm_resize.core.registry.handler_for(nets.Flatten) is None


def test_what_follows_the_weights():
    """Moments and an average follow; a file of one size fits a model of another; several sizes at once."""
    timm_resize.infer(nets.Plain)
    model = nets.Plain(OLD)
    before, ema = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, *OLD)).sum().backward()
    optimizer.step()
    trained = copy.deepcopy(model)
    timm_resize.resize_(model, WIDE, optimizer=optimizer, ema=ema)
    assert optimizer.state[model.pos_embed]["exp_avg"].shape == model.pos_embed.shape
    assert torch.equal(ema.pos_embed, resized(before, WIDE).pos_embed)
    fitted = timm_resize.resize_state_dict(trained.state_dict(), model, source=OLD)
    assert torch.equal(fitted["pos_embed"], model.pos_embed)
    x, y = torch.randn(1, 3, *OLD), torch.randn(1, 3, *WIDE)
    both = timm_resize.MultiSize(trained)
    assert torch.equal(both(y), model(y))
    assert torch.equal(both(x), trained(x))
    with timm_resize.at_size(trained, WIDE):
        assert torch.equal(trained(y), model(y))
    assert trained.img_size == OLD


def test_a_class_with_a_handler():
    """What a handler was written for is not inferred over it."""

    @timm_resize.register(nets.Plain)
    def plan(model, ctx):
        yield from ()

    with pytest.raises(ResizeError, match="would be its second handler"):
        timm_resize.infer(nets.Plain)
