"""MViTv2: relative position tables keep their offset 0, and offsets as a share of the image."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.mvitv2 import cal_rel_pos_type

import timm_resize
from tests.helpers.oracle import assert_same_structure, image, redraw_, stock
from tests.helpers.transposed import transposed
from timm_resize.handlers.mvitv2 import QueryKeyOffset, _table

PAIRS = [(56, 14, 80, 20), (56, 14, 32, 8), (28, 28, 40, 40), (14, 28, 20, 40), (28, 14, 34, 17), (56, 14, 58, 15)]
"""Queries and keys before and after: pooled keys, equal sizes, pooled queries, larger and smaller, 15 = ceil(58/4)."""


@pytest.fixture(scope="module")
def model():
    """A redrawn mvitv2_tiny at 224."""
    return redraw_(stock("mvitv2_tiny", num_classes=3))


def offset_map(old_query: int, old_key: int, query: int, key: int, **options) -> QueryKeyOffset:
    old, new = _table(old_query, old_key), _table(query, key)
    return QueryKeyOffset(old[0], new[0], old[1], old[2], new[1], **options)


def read(table: torch.Tensor, query: int, key: int) -> torch.Tensor:
    """Return what stock's attention adds for (query, key) along one axis of a table (rows, 1)."""
    q = torch.ones(1, 1, query, 1)
    flat = torch.zeros(1, 1)
    return cal_rel_pos_type(torch.zeros(1, 1, query, key), q, False, (query, 1), (key, 1), table, flat)[0, 0]


def shares(query: int, key: int) -> torch.Tensor:
    """Return the (query, key) offsets as shares of the image: i/query - j/key."""
    return (torch.arange(query) / query)[:, None] - torch.arange(key) / key


@pytest.mark.parametrize("pair", PAIRS)
def test_a_smooth_function_of_the_offset_is_read_back_at_the_new_size(pair):
    """A table filled with f(offset / image), read by stock's own attention after the resize, still gives f."""
    old_query, old_key, query, key = pair

    def f(share: torch.Tensor) -> torch.Tensor:
        return torch.sin(2.0 * share) + 0.5 * share

    rows, zero, _ = _table(old_query, old_key)
    table = f((torch.arange(rows) - zero) / max(old_query, old_key)).unsqueeze(1)
    want = f(shares(old_query, old_key))
    torch.testing.assert_close(read(table, old_query, old_key), want, atol=1e-5, rtol=0)  # the test's own premise
    got = read(offset_map(*pair).matrix().float() @ table, query, key)
    share, old = shares(query, key), shares(old_query, old_key)
    inside = (share >= old.min()) & (share <= old.max())  # outside, the old table has no row
    step = 0.0 if max(query, key) % min(query, key) == 0 else 2.5 / max(query, key)  # forward truncates to a row
    torch.testing.assert_close(got[inside], f(share)[inside], atol=0.005 + step, rtol=0)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_offset_zero_is_exact(pair, mode):
    """Query 0 on key 0 reads the same value bit for bit, also when the axis shrinks with a widened kernel."""
    old_query, old_key, query, key = pair
    table = torch.randn(_table(old_query, old_key)[0], 1, generator=torch.Generator().manual_seed(0))
    new = (offset_map(*pair, mode=mode).matrix() @ table.double()).float()
    assert read(new, query, key)[0, 0] == read(table, old_query, old_key)[0, 0]


def test_rows_that_were_never_trained_are_not_mixed_in():
    """With keys pooled by 4 forward reads rows 0 to 107 of 111: the last three have no gradient, so no weight."""
    assert _table(56, 14) == (111, 52, 107)
    for pair in ((56, 14, 80, 20), (56, 14, 32, 8)):
        assert (offset_map(*pair).matrix()[:, 108:] == 0).all()


@pytest.mark.parametrize("size", [320, 192])
def test_structure_equals_a_stock_build_where_its_rounding_is_right(model, size):
    """At multiples of 32 stock's constructor counts as its forward does: equal shapes and attributes."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, size)
    assert_same_structure(ours, stock("mvitv2_tiny", num_classes=3, img_size=size))


@pytest.mark.parametrize("size", [230, 240, 250, 272, (224, 320), (200, 136), 40, 5])
def test_odd_sizes_get_the_tables_that_forward_reads(model, size):
    """Every row that forward reads exists and it reads the last: the longest table index is within one row."""
    ours = copy.deepcopy(model)
    timm_resize.resize_(ours, size)
    size = (size, size) if isinstance(size, int) else size
    feats, seen = [], []

    def keep(module, args, output):
        feats.append((tuple(args[1]), tuple(output[1])))
        seen.append(module)

    for stage in ours.stages:
        for block in stage.blocks:
            block.attn.register_forward_hook(keep)
    with torch.inference_mode():
        assert ours(image(size)).isfinite().all()
    for attention, (feat, query) in zip(seen, feats, strict=True):
        stride = attention.pool_k.stride
        key = tuple(-(-side // by) for side, by in zip(feat, stride, strict=True))  # 3x3, padding 1: rounds up
        assert attention.rel_pos_h.shape[0] == 2 * max(query[0], key[0]) - 1
        assert attention.rel_pos_w.shape[0] == 2 * max(query[1], key[1]) - 1
    for stage in ours.stages:
        assert stage.feat_size in [query for _, query in feats]


def test_transposed_images_give_the_same_logits(model):
    """H > W and W > H: the transposed model at the transposed size sees the transposed image alike."""
    tall, wide = copy.deepcopy(model), transposed(model, {"rel_pos_h": "rel_pos_w"})
    timm_resize.resize_(tall, (288, 160))
    timm_resize.resize_(wide, (160, 288))
    with torch.inference_mode():
        x = image((288, 160))
        torch.testing.assert_close(tall(x), wide(x.transpose(-1, -2)), atol=1e-4, rtol=1e-4)


def test_class_token_tables_follow_too():
    """The class token has no offsets: tables of the _cls variants are resized as those without."""
    model = stock("mvitv2_small_cls", num_classes=3)
    timm_resize.resize_(model, (160, 224))
    with torch.inference_mode():
        assert model(image((160, 224))).isfinite().all()


def test_features_equal_those_of_a_stock_feature_model_at_the_size(model):
    """features_only: resized and then loaded into stock's wrapper at the new size, the feature maps agree."""
    kwargs = {"features_only": True, "out_indices": (0, 1, 2)}
    ours = stock("mvitv2_tiny", **kwargs)
    timm_resize.resize_(ours, 320)
    theirs = stock("mvitv2_tiny", img_size=320, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        x = image((320, 320))
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b)
