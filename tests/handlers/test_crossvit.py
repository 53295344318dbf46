"""CrossViT: a change of resolution gives both branches larger images, not the same ones rescaled."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import timm_resize
from tests.helpers.oracle import assert_same_structure, image, redraw_, stock, tensors
from tests.helpers.sizes import (
    ODD,
    assert_as_built,
    assert_features_as_stock,
    assert_runs_or_names_sizes_that_run,
    assert_transposes,
    pair,
    resized,
    transposed_table,
    wave,
)
from tests.helpers.transposed import transposed

NAMES = ["crossvit_9_240", "crossvit_9_dagger_240"]
SMALL = {"depth": [[1, 1, 0]], "embed_dim": [32, 64], "num_heads": [2, 2], "num_classes": 3}


@pytest.fixture(scope="module", params=NAMES)
def base(request):
    """A redrawn small CrossViT at 240: 20x20 patches of 12, and 14x14 of 16 in the image scaled to 224."""
    return redraw_(stock(request.param, **SMALL))


@pytest.mark.parametrize(
    ("size", "images", "grids"),
    [
        (480, [(480, 480), (448, 448)], [(40, 40), (28, 28)]),  # twice 240 and 224
        ((120, 360), [(120, 360), (112, 336)], [(10, 30), (7, 21)]),
        (384, [(384, 384), (352, 352)], [(32, 32), (22, 22)]),  # 14/15 of 384 is 358.4: 22.4 patches
        (256, [(252, 252), (240, 240)], [(21, 21), (15, 15)]),  # 21.3 patches; 238.9 = 14.9 patches
    ],
)
def test_each_branch_gets_the_scaled_size_in_whole_patches(model, size, images, grids):
    """Image sizes and tables of both branches, worked out by hand; the projection makes just those grids."""
    resized(model, size)
    assert model.img_size == pair(size)
    assert model.img_size_scaled == images
    for number, (embed, (h, w)) in enumerate(zip(model.patch_embed, grids, strict=True)):
        assert embed.img_size == images[number]
        assert embed.num_patches == h * w
        assert getattr(model, f"pos_embed_{number}").shape[1] == 1 + h * w
        assert embed.proj(torch.zeros(1, 3, *images[number])).shape[2:] == (h, w)


def test_a_larger_image_alone_is_not_a_change_of_resolution(model):
    """Before a resize the first branch cuts a 480 image scaled down to 240; afterwards the image itself."""
    seen = []
    model.patch_embed[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = image((480, 480))
    with torch.inference_mode():
        model(x)
        resized(model, 480)(x)
    assert seen[0].shape[2:] == (240, 240)
    assert seen[1] is x


@pytest.mark.parametrize("size", [*ODD, 256, 288, 18, (250, 408)])
def test_a_size_works_or_the_error_names_sizes_that_do(model, size):
    """Decided by what forward can do, also for feature maps."""
    assert_runs_or_names_sizes_that_run(model, size)


@pytest.mark.parametrize("size", [256, 288, 250, (224, 320)])
@pytest.mark.parametrize("name", NAMES)
def test_models_created_where_stock_miscounts_patches(name, size):
    """Stock builds tables for patches that no branch has; created through us, the model runs, as a resized one."""
    with pytest.raises(RuntimeError, match="must match"):
        stock(name, img_size=size, **SMALL)(image(pair(size)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an image scaled to whole patches
        created = timm_resize.create_model(name, img_size=size, **SMALL).eval()
    assert created(image(pair(size))).isfinite().all()
    other = resized(stock(name, **SMALL), size)
    assert {n: p.shape for n, p in created.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert created.img_size_scaled == other.img_size_scaled


@pytest.mark.parametrize("size", [120, 360, (480, 240), (120, 600)])
@pytest.mark.parametrize("name", NAMES)
def test_structure_equals_a_fresh_stock_build(name, size):
    """Where both branches come out whole, everything is as stock's constructor makes it."""
    assert_as_built(name, size, **SMALL)


@pytest.mark.parametrize("size", [156, 26])
def test_a_size_that_stock_gets_right_by_dropping_a_row_stays_stocks(size):
    """At 156, 14/15 is 145 pixels, nine patches and one pixel, which stock counts right; so that is what we take."""
    name = NAMES[0]
    stock(name, img_size=size, **SMALL)(image((size, size)))
    with pytest.warns(UserWarning, match="drops . rows"):
        ours = timm_resize.create_model(name, img_size=size, **SMALL).eval()
    assert_same_structure(ours, stock(name, img_size=size, **SMALL))


@pytest.mark.parametrize("size", [252, 256, 384, 250, (384, 192)])
def test_a_saved_configuration_builds_the_same_in_stock(model, base, size):
    """The recorded `img_scale` makes stock's constructor build these branches, so the weights load there."""
    resized(model, size)
    name = NAMES["3" in base.patch_embed[0].proj._modules]
    theirs = stock(name, **{**SMALL, **model._model_args})
    theirs.load_state_dict(model.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(theirs(image(pair(size))), model(image(pair(size))))


def test_where_no_scale_can_say_it_the_plan_does(model):
    """(252, 264) wants 240/252 in one direction and 240/264 in the other."""
    plan = timm_resize.plan_resize(model, (252, 264))
    assert any("needs timm_resize" in note for note in plan.notes)


@pytest.mark.parametrize("between", [250, 30, (384, 256), 18])
def test_rounded_sizes_do_not_add_up(model, base, between):
    """A detour over a size whose branches are rounded leads back to every bit, and on to what the direct way gives."""
    direct = resized(copy.deepcopy(base), 384)
    resized(model, between)
    detour = resized(copy.deepcopy(model), 384)
    resized(model, 240)
    for got, want in ((detour, direct), (model, base)):
        assert got.img_size_scaled == want.img_size_scaled
        assert {k: v for k, v in vars(got).items() if k == "img_scale"} == {
            k: v for k, v in vars(want).items() if k == "img_scale"
        }
        assert all(torch.equal(t, tensors(want)[n]) for n, t in tensors(got).items())


@pytest.mark.parametrize("size", [(360, 240), (120, 480)])
def test_smooth_position_tables_are_read_back(model, size):
    """A smooth function of the place in the image, sampled per patch, is that at the new patches, in both branches."""
    with torch.no_grad():
        for table, n in ((model.pos_embed_0, 20), (model.pos_embed_1, 14)):
            table[0, 1:] = wave((n, n)).reshape(-1, 1).expand(-1, table.shape[2])
    resized(model, size)
    for table, n in ((model.pos_embed_0, 20), (model.pos_embed_1, 14)):
        grid = (size[0] * n // 240, size[1] * n // 240)
        torch.testing.assert_close(table[0, 1:, 0].reshape(grid).detach(), wave(grid), atol=0.05, rtol=0)


@pytest.mark.parametrize("size", [(360, 240), (120, 480), (250, 272)])
def test_height_and_width_are_treated_alike(model, size):
    """The transposed model gives the same logits for the transposed image."""
    turned = transposed(model)
    for name, n in (("pos_embed_0", 20), ("pos_embed_1", 14)):
        getattr(turned, name).data = transposed_table(getattr(turned, name), (n, n), prefix=1)
    assert_transposes(model, turned, size)


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_those_of_a_stock_feature_model(name):
    """features_only, of both branches, at a size that is not square."""
    assert_features_as_stock(name, (120, 360), **SMALL)
