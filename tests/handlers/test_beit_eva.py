"""BEiT and EVA: bias tables, position embeddings and rotary caches against stock timm."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import AttentionPool2d, AttentionPoolLatent, resample_abs_pos_embed
from timm.layers.pos_embed_sincos import (
    RotaryEmbedding,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
)
from torch import nn

import timm_resize
import timm_resize.core.transaction
from tests.helpers.oracle import assert_close, assert_same_structure, image, redraw_, stock
from timm_resize.core.apply import apply_plan
from timm_resize.core.context import Context
from timm_resize.core.plan import ResizePlan
from timm_resize.core.registry import handler_for
from timm_resize.core.request import Request
from timm_resize.errors import InvalidSizeError, UnsupportedModelError

NARROW = {"depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 3}
BEIT = ("beitv2_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True})
MODELS = [
    BEIT,
    ("eva02_tiny_patch14_224", {}),
    ("vit_small_patch16_rope_ape_224", {}),
    ("vit_small_patch16_rope_mixed_ape_224", {}),
    ("vit_pe_core_base_patch16_224", {}),
    ("vit_tiny_patch16_dinov3_qkvb", {"dynamic_img_size": False}),
]
"""Every table and every cached rotary embedding; for BEiT the tables per block and the shared one at once."""


def build(name: str, extra: dict, **kwargs) -> nn.Module:
    return stock(name, **{**NARROW, **extra, **kwargs})


def resize_layer(layer: nn.Module, **geometry) -> ResizePlan:
    """Plan and apply one layer's own handler, as the handler of its model would have it called."""
    ctx = Context(layer, Request(), None, (1, 1))
    plan = ResizePlan(type(layer).__name__, None, (1, 1), tuple(ctx.visit(layer, **geometry)))
    apply_plan(layer, plan)
    return plan


@pytest.mark.parametrize(("name", "extra"), MODELS)
def test_an_equal_count_of_other_shape_is_resampled(name, extra):
    """16x16 cells to 8x32 keeps every token count, and still equals stock's `set_input_size`, not a copy."""
    model = redraw_(build(name, extra))
    rows, columns = model.patch_embed.grid_size
    patch = model.patch_embed.patch_size[0]
    size = (rows // 2 * patch, columns * 2 * patch)
    theirs = copy.deepcopy(model)
    theirs.set_input_size(img_size=size)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    timm_resize.resize_(model, size)
    assert_close(model, theirs)
    assert_same_structure(model, theirs)
    if model.pos_embed is not None:
        assert model.pos_embed.shape == before["pos_embed"].shape
        assert not torch.equal(model.pos_embed, before["pos_embed"])


def test_beit_checkpoint_of_an_equal_count_is_resampled():
    """`create_model` resamples BEiT's position embedding to 7x28 as well, where stock's loader copies its rows."""
    name, extra = BEIT
    model = redraw_(build(name, extra))
    want = copy.deepcopy(model)
    want.set_input_size(img_size=(112, 448))
    overlay = {"state_dict": model.state_dict(), "num_classes": 3}
    args = {**NARROW, **extra, "img_size": (112, 448), "pretrained": True, "pretrained_cfg_overlay": overlay}
    assert_close(timm_resize.create_model(name, **args), want)
    assert torch.equal(stock(name, **args).pos_embed, model.pos_embed)  # why we differ from it here


@pytest.mark.parametrize("size", [(224, 224), (336, 224), (160, 384)])
def test_beit_keeps_the_rows_of_the_class_token(size):
    """The last three rows of every table and the first of the position embedding are copied bit for bit."""
    model = redraw_(build(*BEIT))
    tables = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias_table")}
    class_row = model.pos_embed[:, :1].detach().clone()
    timm_resize.resize_(model, size)
    assert len(tables) == 2
    for name, old in tables.items():
        new = model.get_parameter(name)
        assert new.shape[0] == (2 * size[0] // 16 - 1) * (2 * size[1] // 16 - 1) + 3
        assert torch.equal(new[-3:], old[-3:])
    assert torch.equal(model.pos_embed[:, :1], class_row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "extra"), MODELS)
def test_buffers_in_half_precision_equal_a_fresh_build(name, extra, dtype):
    """Cast, then resized, every buffer is bit for bit that of a fresh build at the size, cast."""
    patch = build(name, extra, device="meta").patch_embed.patch_size[0]
    size = (patch * 12, patch * 20)
    model = build(name, extra).to(dtype)
    timm_resize.resize_(model, size)
    assert_same_structure(model, build(name, extra, img_size=size).to(dtype))


ROPES = [
    (RotaryEmbedding, {"dim": 16, "in_pixels": False, "ref_feat_shape": (14, 14)}),
    (RotaryEmbedding, {"dim": 16, "in_pixels": True}),
    (RotaryEmbeddingCat, {"dim": 16, "in_pixels": False, "ref_feat_shape": (14, 14)}),
    (
        RotaryEmbeddingCat,
        {"dim": 16, "in_pixels": False, "grid_offset": 1.0, "grid_indexing": "xy", "rotate_half": True},
    ),
    (RotaryEmbeddingDinoV3, {"dim": 16}),
    (
        RotaryEmbeddingDinoV3,
        {"dim": 16, "temperature": None, "min_period": 0.5, "max_period": 90.0, "normalize_coords": "max"},
    ),
    (RotaryEmbeddingMixed, {"dim": 48, "num_heads": 3, "depth": 2}),
    (RotaryEmbeddingMixed, {"dim": 48, "num_heads": 3, "depth": 2, "grid_indexing": "ij"}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grid", [(7, 28), (20, 14), (5, 5)])
@pytest.mark.parametrize(("cls", "kwargs"), ROPES)
def test_rope_equals_a_fresh_layer(cls, kwargs, grid, dtype):
    """Every rotary layer at another grid is the layer built there: buffers bit for bit, attributes, same freqs."""
    rope = cls(feat_shape=(14, 14), dtype=dtype, **kwargs)
    freqs = {n: (p, p.detach().clone()) for n, p in rope.named_parameters()}
    resize_layer(rope, feat_shape=grid)
    assert_same_structure(rope, cls(feat_shape=grid, dtype=dtype, **kwargs))
    for name, (parameter, value) in freqs.items():
        assert rope.get_parameter(name) is parameter
        assert torch.equal(parameter, value)


@pytest.mark.parametrize(("cls", "kwargs"), ROPES)
def test_rope_without_a_grid_has_nothing_to_change(cls, kwargs):
    """A rotary layer that computes its embedding in each forward is left alone; so is the same grid."""
    assert not resize_layer(cls(**kwargs), feat_shape=(7, 28))
    assert not resize_layer(cls(feat_shape=(14, 14), **kwargs), feat_shape=(14, 14))


def test_rope_whose_model_is_unknown_is_refused():
    """A cached rotary layer in a model without a handler is an error, not a stale cache."""
    model = nn.Sequential(RotaryEmbeddingCat(16, feat_shape=(14, 14)))
    with pytest.raises(UnsupportedModelError, match="0 is a RotaryEmbeddingCat, whose grid only its model knows"):
        timm_resize.plan_resize(model, 256)


@pytest.mark.parametrize(("model", "name"), [(MODELS[1], "bands"), (MODELS[5], "periods")])
def test_computing_a_rope_writes_nothing(model, name, monkeypatch):
    """The frequencies that the layer's own refill overwrites stay as they are when applying fails."""
    model = build(*model)
    frequencies = model.rope.get_buffer(name).fill_(7.0)

    def fail(do):
        raise RuntimeError("injected")

    monkeypatch.setattr(timm_resize.core.transaction, "_write", fail)
    with pytest.raises(RuntimeError, match="injected"):
        timm_resize.resize_(model, 448)
    assert model.rope.get_buffer(name) is frequencies
    assert torch.equal(frequencies, torch.full_like(frequencies, 7.0))


def test_eva02_keeps_its_pretraining_grid():
    """Positions at 32x32 stay scaled to the 16x16 grid of the pretraining: cell 2i gets the angles of cell i."""
    model = build("eva02_tiny_patch14_224", {})
    old = model.rope.get_embed().reshape(16, 16, -1).clone()
    timm_resize.resize_(model, 448)
    assert model.rope.feat_shape == (32, 32)
    assert model.rope.ref_feat_shape == (16, 16)
    new = model.rope.get_embed().reshape(32, 32, -1)
    torch.testing.assert_close(new[::2, ::2], old, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_base_patch16_sapiens2"])
def test_a_dynamic_eva_changes_no_tensor(name):
    """With a rotary embedding per forward only the recorded sizes change, from a non-square native size too."""
    model = stock(name, device="meta", depth=1, **({"num_kv_heads": 6} if "sapiens" in name else {}))
    plan = timm_resize.plan_resize(model, (320, 480))
    assert plan
    assert not plan.tensors
    timm_resize.resize_(model, plan)
    assert model.patch_embed.grid_size == (20, 30)


@pytest.mark.parametrize(("name", "extra"), [MODELS[0], MODELS[1], MODELS[3]])
def test_patch_size_equals_stock(name, extra):
    """A change of patch size and image size at once equals stock's `set_input_size`."""
    model = redraw_(build(name, extra))
    theirs = copy.deepcopy(model)
    theirs.set_input_size(img_size=(192, 256), patch_size=8)
    timm_resize.resize_(model, (192, 256), patch_size=8)
    assert_close(model, theirs)
    assert_same_structure(model, theirs, ignore={"feature_info"})
    assert {i["reduction"] for i in model.feature_info} == {8}  # stock leaves the old patch size here
    assert model._model_args == {**theirs._model_args, "patch_size": (8, 8)}


@pytest.mark.parametrize(("name", "extra"), MODELS)
@pytest.mark.parametrize("cells", [(20, 20), (10, 10), (20, 12), (9, 21)])
def test_features_equal_stock_features_only(name, extra, cells):
    """A resized feature extractor gives the features of stock's, built at the size with the same weights."""
    whole = redraw_(build(name, extra))
    patch = whole.patch_embed.patch_size[0]
    size = (cells[0] * patch, cells[1] * patch)
    ours = build(name, extra, features_only=True, out_indices=(0,), num_classes=0)
    ours.model.load_state_dict(whole.state_dict(), strict=False)
    whole.set_input_size(img_size=size)
    theirs = build(name, extra, features_only=True, out_indices=(0,), num_classes=0, img_size=size)
    theirs.model.load_state_dict(whole.state_dict(), strict=False)
    timm_resize.resize_(ours, size)
    with torch.inference_mode():
        [got], [want] = ours(image(size)), theirs(image(size))
    assert got.shape[-2:] == cells
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "extra"), [MODELS[0], MODELS[2]])
def test_odd_sizes_run_with_a_warning(name, extra):
    """230x250 gives a 14x15 grid, a warning that counts the dropped pixels, and stock's result."""
    model = redraw_(build(name, extra))
    theirs = copy.deepcopy(model)
    theirs.set_input_size(img_size=(230, 250))
    with pytest.warns(UserWarning, match="drops 6 rows and 10 columns"):
        timm_resize.resize_(model, (230, 250))
    assert model.patch_embed.grid_size == (14, 15)
    assert_close(model, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(model(image((230, 250))), theirs(image((230, 250))), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "extra"), [MODELS[0], MODELS[1]])
def test_a_size_below_one_patch_leaves_the_model(name, extra):
    """8x8 is refused before anything is written, where stock fails with half of it written."""
    model = redraw_(build(name, extra))
    duplicate = copy.deepcopy(model)
    with pytest.raises(InvalidSizeError, match="smaller than patch_size"):
        timm_resize.resize_(model, 8)
    assert_close(model, duplicate, tolerance=0.0)
    assert_same_structure(model, duplicate)


def test_a_dynamic_eva_refuses_what_its_forward_refuses():
    """A size that is no multiple of the patch fails in a dynamic model's forward, so it is refused by name."""
    model = build("vit_small_patch16_dinov3", {})
    with pytest.raises(AssertionError):
        model(image((230, 230)))
    with pytest.raises(InvalidSizeError, match=r"Use 224 or 240\."):
        timm_resize.resize_(model, 230)


@pytest.mark.parametrize("size", [(4, 9), (3, 12), (8, 8), (5, 2)])
def test_attention_pool_2d_equals_its_own_resampling(size):
    """A resized pool answers as the original does on that map, whose forward resamples each time; 4x9 = 6x6 too."""
    torch.manual_seed(0)
    pool = AttentionPool2d(16, feat_size=6, head_dim=8).eval()
    nn.init.normal_(pool.pos_embed)
    x = torch.randn(2, 16, *size)
    want = pool(x)
    row = pool.pos_embed[:1].detach().clone()
    resize_layer(pool, feat_size=size)
    assert pool.pos_embed.shape == (1 + size[0] * size[1], 16)
    assert (pool.feat_size, pool.seq_len) == (size, size[0] * size[1])
    assert torch.equal(pool.pos_embed[:1], row)
    torch.testing.assert_close(pool(x), want, atol=1e-5, rtol=1e-5)


def test_attention_pool_latent_follows_the_grid():
    """A latent pool with an absolute embedding is resampled between the grids given, its prefix rows kept."""
    pool = AttentionPoolLatent(16, num_heads=2, pos_embed="abs", feat_size=1 + 36)
    nn.init.normal_(pool.pos_embed)
    want = resample_abs_pos_embed(pool.pos_embed[None].detach(), [4, 9], [6, 6], num_prefix_tokens=1)[0]
    resize_layer(pool, old=(6, 6), new=(4, 9), prefix=1)
    torch.testing.assert_close(pool.pos_embed.detach(), want, atol=1e-5, rtol=0)
    assert pool.feat_size == 37


def test_attention_pool_latent_without_a_grid_is_refused():
    """Put into a model that does not pass its grid, such a pool is an error; one without an embedding is not."""
    model = build("vit_pe_core_base_patch16_224", {})
    assert handler_for(type(model.attn_pool)) is not None
    timm_resize.plan_resize(model, 256)
    model.attn_pool = AttentionPoolLatent(48, num_heads=3, pos_embed="abs", feat_size=197)
    with pytest.raises(UnsupportedModelError, match="attn_pool has a position embedding of 197 tokens"):
        timm_resize.plan_resize(model, 256)
