"""Token-mixing MLPs at another size: what a block computes on a resized grid is the resized result."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import GatedMlp, GluMlp, Mlp
from timm.models.mlp_mixer import Affine, MixerBlock, MlpMixer, ResBlock, SpatialGatingBlock
from torch import Tensor, nn

import timm_resize
from tests.helpers.oracle import assert_same_structure, image, redraw_, stock
from tests.helpers.resampling import grid_resize, one_axis
from timm_resize.resample import token_matrix, token_writer

Grid = tuple[int, int]

VARIANTS = {
    "mixer": dict(block_layer=MixerBlock, mlp_layer=Mlp),
    "gmixer": dict(block_layer=MixerBlock, mlp_layer=GluMlp, mlp_ratio=(1.0, 4.0), act_layer=nn.SiLU),
    "resmlp": dict(block_layer=ResBlock, mlp_ratio=4, norm_layer=Affine),
    "gmlp": dict(block_layer=SpatialGatingBlock, mlp_ratio=6, mlp_layer=GatedMlp),
}
GRIDS = [((7, 7), (10, 10)), ((7, 7), (5, 5)), ((4, 9), (7, 12)), ((8, 5), (4, 11)), ((14, 14), (7, 28))]
"""Growing, shrinking, non-square, mixed, equal counts of another aspect."""


def mixer(variant: str, grid: Grid, blocks: int = 2, seed: int = 0) -> MlpMixer:
    """Return a small redrawn model of the class, 4-pixel patches."""
    size = (4 * grid[0], 4 * grid[1])
    model = MlpMixer(10, size, patch_size=4, num_blocks=blocks, embed_dim=32, **VARIANTS[variant])
    redraw_(model, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("ls1"):
                p.fill_(0.5)  # as drawn it would hide the tokens
            if name.endswith("gate.proj.bias"):
                p.copy_(1.0 + 0.01 * p)  # what training starts from
    return model.double().eval()


def resized(model: MlpMixer, grid: Grid, **options) -> MlpMixer:
    """Return a copy resized to a grid of its own patches."""
    duplicate, (height, width) = copy.deepcopy(model), model.stem.patch_size
    timm_resize.resize_(duplicate, (grid[0] * height, grid[1] * width), **options)
    return duplicate


def interpolate(tokens: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resize tokens (batch, h*w, dim) as torch resizes images."""
    x = tokens.mT.reshape(tokens.shape[0], -1, *old)
    return F.interpolate(x, size=new, mode="bicubic", antialias=True).flatten(2).mT


def mixing(block: nn.Module, x: Tensor) -> Tensor:
    """Run only what mixes tokens (batch, h*w, dim)."""
    if isinstance(block, MixerBlock):
        return block.mlp_tokens(x.mT).mT
    linear = block.linear_tokens if isinstance(block, ResBlock) else block.mlp_channels.gate.proj
    return linear(x.mT).mT


# -- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("old", "new"), [g for g in GRIDS if g[1][0] >= g[0][0] and g[1][1] >= g[0][1]])
def test_growing_commutes_with_resizing_tokens(variant, old, new):
    """The mixing layers of the grown model on resized tokens give the resized output, gates included, to 1e-11."""
    before = mixer(variant, old)
    after = resized(before, new)
    x = torch.randn(2, old[0] * old[1], 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(before.blocks, after.blocks, strict=True):
        want = interpolate(mixing(a, x), old, new)
        torch.testing.assert_close(mixing(b, interpolate(x, old, new)), want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_constant_tokens_mix_alike(variant, old, new):
    """On a constant grid the mixing layers give the resized output at every size and aspect."""
    before = mixer(variant, old)
    after = resized(before, new)
    token = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(before.blocks, after.blocks, strict=True):
        want = interpolate(mixing(a, token.expand(-1, old[0] * old[1], -1)), old, new)
        got = mixing(b, token.expand(-1, new[0] * new[1], -1))
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def axis_reader(old: int, new: int) -> Tensor:
    """Return what reads a grown axis back, or enlarges a shrunk one: (old, new)."""
    if new < old:
        return one_axis(new, old, "bicubic", antialias=True).contiguous()
    return torch.linalg.pinv(one_axis(old, new, "bicubic", antialias=True)).contiguous()


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_each_layer_has_its_map(old, new):
    """Readers, writers and matrices go to the right layers: shapes, Linear's attributes, and the map of each."""
    n = new[0] * new[1]
    write = grid_resize(old, new)  # by torch's own interpolation
    read = torch.kron(*(axis_reader(a, b) for a, b in zip(old, new, strict=True)))
    maps = {"reader": lambda w: w @ read, "writer": lambda w: write @ w, "matrix": lambda w: write @ w @ read}
    layers = {
        "mixer": {
            "mlp_tokens.fc1.weight": ("reader", (16, n)),
            "mlp_tokens.fc2.weight": ("writer", (n, 16)),
            "mlp_tokens.fc2.bias": ("writer", (n,)),
        },
        "gmixer": {
            "mlp_tokens.fc1.weight": ("reader", (32, n)),
            "mlp_tokens.fc2.weight": ("writer", (n, 16)),
            "mlp_tokens.fc2.bias": ("writer", (n,)),
        },
        "resmlp": {"linear_tokens.weight": ("matrix", (n, n)), "linear_tokens.bias": ("writer", (n,))},
        "gmlp": {"mlp_channels.gate.proj.weight": ("matrix", (n, n)), "mlp_channels.gate.proj.bias": ("writer", (n,))},
    }
    for variant, expected in layers.items():
        before = mixer(variant, old, blocks=1)
        after = resized(before, new)
        for name, (kind, shape) in expected.items():
            was, now = (m.blocks[0].get_parameter(name) for m in (before, after))
            assert tuple(now.shape) == shape
            torch.testing.assert_close(now.detach(), maps[kind](was.detach()), atol=1e-9, rtol=1e-9)
        kept = {k for k in before.state_dict() if k.removeprefix("blocks.0.") not in expected}
        assert all(torch.equal(after.state_dict()[k], before.state_dict()[k]) for k in kept)
        for module in after.modules():
            if isinstance(module, nn.Linear):
                assert (module.out_features, module.in_features) == tuple(module.weight.shape)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_gate_bias_stays_near_one(old, new):
    """gMLP's gate starts open: a bias of 1 stays 1, one spread by .01 stays within .02 of it."""
    model = mixer("gmlp", old)
    with torch.no_grad():
        model.blocks[0].mlp_channels.gate.proj.bias.fill_(1.0)
    after = resized(model, new)
    flat, spread = (b.mlp_channels.gate.proj.bias for b in after.blocks)
    torch.testing.assert_close(flat, torch.ones_like(flat), atol=1e-12, rtol=0)
    assert (spread - 1.0).abs().max() < 0.02


@pytest.mark.parametrize("variant", VARIANTS)
def test_height_and_width_are_treated_alike(variant):
    """Transposing the image and every token axis transposes the resize."""
    old, new = (4, 6), (7, 5)
    model = mixer(variant, old)
    turned = mixer(variant, old[::-1])
    flip = torch.arange(24).reshape(old).T.reshape(-1)
    with torch.no_grad():
        for name, p in turned.named_parameters():
            was = model.get_parameter(name)
            for dim in (d for d in range(was.dim()) if was.shape[d] == 24):
                was = was.index_select(dim, flip)
            p.copy_(was.mT if name == "stem.proj.weight" else was)
    x = torch.randn(1, 3, 4 * new[0], 4 * new[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        got, want = resized(turned, new[::-1])(x.mT), resized(model, new)(x)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


# -- end to end ------------------------------------------------------------------------------


def waves(size: Grid, count: int = 3) -> Tensor:
    """Return smooth functions sampled at the centres of a grid: (count², h*w), float64."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in size)
    rows, columns = (torch.stack([torch.cos(math.pi * i * a) for i in range(count)]) for a in (y, x))
    return torch.einsum("ih,jw->ijhw", rows, columns).reshape(count * count, -1)


def smooth_(model: MlpMixer, grid: Grid) -> MlpMixer:
    """Keep only the smooth part of every weight over tokens, as learned ones are mostly smooth."""
    basis = torch.linalg.qr(waves(grid).T)[0]
    keep, n = basis @ basis.T, grid[0] * grid[1]
    with torch.no_grad():
        for block in model.blocks:
            for p in block.parameters():
                if p.shape[0] == n:
                    p.copy_(keep @ p)
                if p.dim() == 2 and p.shape[1] == n:
                    p.copy_(p @ keep)
    return model


def by_rows(model: MlpMixer, grid: Grid) -> MlpMixer:
    """Return what is found in the wild: every token axis interpolated like an image, sums not accounted for."""
    duplicate, old = resized(model, grid), model.stem.grid_size
    with torch.no_grad():
        for name, p in duplicate.named_parameters():
            was = model.get_parameter(name)
            for dim in (d for d in range(was.dim()) if was.shape[d] != p.shape[d]):
                was = token_writer(old, grid, dim=dim)(was)
            p.copy_(was)
    return duplicate


def picture(grid: Grid, old: Grid, patch: int, seed: int) -> Tensor:
    """Return a smooth image on the old patch grid, resized to `grid`, every patch of one colour."""
    amplitude = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cells = (amplitude @ waves(old)).reshape(1, 3, *old)
    if grid != old:
        cells = F.interpolate(cells, size=grid, mode="bicubic", antialias=True)
    return cells.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("new", "bound", "factor"), [((10, 10), 0.06, 6), ((14, 14), 0.06, 6), ((5, 5), 0.15, 1.2), ((4, 12), 0.15, 1)]
)
def test_a_smooth_image_gives_nearly_the_same_logits(variant, new, bound, factor):
    """Logits of a smooth image on the resized grid: within the bound, and so many times closer than by rows.

    7×7 → 14×14, relative errors: Mixer .020, by rows .347; gMixer .049, .916; ResMLP .001, .081; gMLP .013, .350.
    """
    old = (7, 7)
    model = smooth_(mixer(variant, old, blocks=4), old)
    ours, naive = resized(model, new), by_rows(model, new)
    with torch.no_grad():
        errors = torch.zeros(2)
        for seed in range(4):
            want, x = model(picture(old, old, 4, seed)), picture(new, old, 4, seed)
            errors += torch.tensor([((m(x) - want).norm() / want.norm()).item() / 4 for m in (ours, naive)])
    assert errors[0] < bound
    assert errors[0] < errors[1] / factor


# -- structure -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixer_s32_224", "gmixer_12_224", "resmlp_12_224", "gmlp_ti16_224"])
@pytest.mark.parametrize("size", [(320, 448), (448, 128), (32, 320)])
def test_structure_is_a_fresh_builds(name, size):
    """Registered models on the meta device: shapes and attributes as stock's constructor makes them."""
    ours = stock(name, device="meta")
    timm_resize.resize_(ours, size)
    assert_same_structure(ours, stock(name, img_size=size, device="meta"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_patch_size(variant):
    """A new patch size alone changes the grid; with the size alike the grid, and every token weight, stays."""
    model = mixer(variant, (6, 6))
    finer = copy.deepcopy(model)
    timm_resize.resize_(finer, patch_size=2)
    assert finer.stem.grid_size == (12, 12)
    assert finer.stem.proj.weight.shape[-2:] == (2, 2)
    assert [i["reduction"] for i in finer.feature_info] == [2, 2]
    finer(torch.zeros(1, 3, 24, 24, dtype=torch.float64))
    larger = copy.deepcopy(model)
    plan = timm_resize.resize_(larger, 48, patch_size=8)
    assert {c.key for c in plan if c.kind == "parameter"} == {"stem.proj.weight"}
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():  # the identity of FlexiViT, through the whole model; the kernel's map has float32 weights
        up = F.interpolate(
            x.reshape(2, 3, 6, 4, 6, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 4, 4),
            size=(8, 8),
            mode="bicubic",
            antialias=True,
        )
        patches = up.reshape(2, 6, 6, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 48, 48)
        torch.testing.assert_close(larger(patches), model(x), atol=1e-4, rtol=1e-4)


def test_create_model_with_a_patch_size():
    """Registered mixers pass their patch size to the constructor twice, so stock has no patch_size=; ours does."""
    with pytest.raises(TypeError):
        stock("mixer_s32_224", patch_size=16, device="meta")
    model = timm_resize.create_model("mixer_s32_224", img_size=112, patch_size=16, device="meta")
    assert model.stem.grid_size == (7, 7)
    assert model.blocks[0].mlp_tokens.fc1.in_features == 49
    assert model.feature_info[0]["reduction"] == 16


def test_sizes():
    """Less than a patch is refused with the nearest size; a rest is dropped with a warning that counts it."""
    model = stock("gmlp_ti16_224", device="meta")
    with pytest.raises(timm_resize.InvalidSizeError, match=r"smaller than patch_size=16\. Use 16\."):
        timm_resize.plan_resize(model, 15)
    with pytest.warns(UserWarning, match="drops 6 rows and 0 columns"):
        timm_resize.resize_(model, (230, 160))
    assert model.stem.grid_size == (14, 10)


@pytest.mark.parametrize("name", ["mixer_s32_224", "gmlp_ti16_224"])
def test_feature_wrappers(name):
    """features_only keeps the first blocks; the features equal those of stock's wrapper built at the size."""
    options = dict(features_only=True, out_indices=(0, 2))
    ours, size = redraw_(stock(name, **options)), (160, 96)
    timm_resize.resize_(ours, size)
    theirs = stock(name, img_size=size, **options)
    theirs.load_state_dict(ours.state_dict())
    assert_same_structure(ours, theirs)
    with torch.inference_mode():
        for got, want in zip(ours(image(size)), theirs(image(size)), strict=True):
            assert torch.equal(got, want)


def test_interpolation_options_reach_the_layers():
    """`interpolation=`, `antialias=` and `preset=` choose the map."""
    model, old, new = mixer("resmlp", (7, 7)), (7, 7), (9, 9)
    for options, want in (
        ({}, token_matrix(old, new)),
        ({"interpolation": "nearest"}, token_matrix(old, new, mode="nearest")),
        ({"preset": "deit"}, token_matrix(old, new, antialias=False)),
        ({"preset": "big_vision"}, token_matrix(old, new, mode="bilinear", antialias=False)),
    ):
        plan = timm_resize.plan_resize(model, 36, **options)
        assert {c.how for c in plan if c.name == "weight"} == {want}


def test_an_unknown_block_is_refused():
    """A block type of the user's raises an error that names it, and nothing changes."""

    class Strange(nn.Module):
        def __init__(self, dim, seq_len, mlp_ratio, **_):
            super().__init__()

    model = MlpMixer(img_size=16, patch_size=4, num_blocks=1, embed_dim=8, block_layer=Strange)
    with pytest.raises(timm_resize.UnsupportedModelError, match=r"blocks\.0 is a Strange, which has no handler"):
        timm_resize.resize_(model, 32)
    assert model.stem.img_size == (16, 16)
