"""`create_model` with `img_size`, and the plugin's seam."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file

import timm_resize
from tests.helpers.oracle import image, redraw_, stock, tensors
from tests.helpers.timm_state import timm_objects


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def plugin():
    """The plugin, installed for one test."""
    with timm_resize.install():
        yield


def test_our_create_model_leaves_timm_as_it_is(tmp_path):
    """`timm_resize.create_model` takes a size, with and without weights, and stock still refuses one."""
    before = timm_objects()
    model = timm_resize.create_model("test_resnet", img_size=96, num_classes=2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 2}
    timm_resize.create_model("test_resnet", img_size=64, num_classes=2, pretrained=True, pretrained_cfg_overlay=overlay)
    assert timm_objects() == before
    with pytest.raises(TypeError, match="img_size"):
        timm.create_model("test_resnet", img_size=96)


def test_a_call_without_a_size_is_stock(plugin):
    """Without `img_size` the same seed gives the same bits as stock."""
    torch.manual_seed(3)
    ours = timm.create_model("vit_tiny_patch16_224", depth=1)
    timm_resize.uninstall()
    try:
        torch.manual_seed(3)
        theirs = stock("vit_tiny_patch16_224", depth=1)
    finally:
        timm_resize.install()
    assert all(torch.equal(t, tensors(theirs)[n]) for n, t in tensors(ours).items())
    assert ours._model_args == theirs._model_args


def test_random_weights_at_a_size_that_stock_takes_are_stocks():
    """Without pretrained weights, where stock takes `img_size`, the same seed draws the same bits."""
    torch.manual_seed(3)
    ours = timm_resize.create_model("vit_tiny_patch16_224", img_size=(96, 160), depth=1)
    torch.manual_seed(3)
    theirs = stock("vit_tiny_patch16_224", img_size=(96, 160), depth=1)
    assert all(torch.equal(t, tensors(theirs)[n]) for n, t in tensors(ours).items())
    assert (ours._model_args, ours._traits) == (theirs._model_args, theirs._traits)


def test_a_size_at_which_stock_builds_an_empty_map_is_resized_to():
    """At 8 px LeViT's constructor counts no cell, and its forward makes one."""
    model = timm_resize.create_model("levit_128s", img_size=8, num_classes=3).eval()
    assert model.stages[0].blocks[0].attn.attention_biases.shape == (4, 1)
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_random_weights_where_stock_refuses_the_keyword_are_those_of_no_size():
    """Where stock has no `img_size`, the same seed draws what it draws without one."""
    torch.manual_seed(3)
    ours = timm_resize.create_model("test_resnet", img_size=96)
    torch.manual_seed(3)
    theirs = stock("test_resnet")
    assert all(torch.equal(t, tensors(theirs)[n]) for n, t in tensors(ours).items())
    assert "img_size" not in ours._model_args


def test_scripting_works_as_before(plugin):
    """A resized model scripts, and the script computes the same."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=1, num_classes=2).eval()
    model.set_input_size((64, 96))
    x = image((64, 96))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_a_pretrained_file_of_the_native_size_is_resized(tmp_path):
    """`pretrained_cfg_overlay=dict(file=…)` and `state_dict=` give the same tensors as loading, then resizing."""
    model = redraw_(stock("vit_tiny_patch16_224", depth=1, num_classes=2))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    args = dict(pretrained=True, img_size=(96, 160), depth=1, num_classes=2)
    want = copy.deepcopy(model)
    timm_resize.resize_(want, (96, 160))
    for overlay in ({"file": str(tmp_path / "weights.safetensors")}, {"state_dict": model.state_dict()}):
        ours = timm_resize.create_model(
            "vit_tiny_patch16_224", pretrained_cfg_overlay={**overlay, "num_classes": 2}, **args
        )
        assert all(torch.equal(t, tensors(want)[n]) for n, t in tensors(ours).items())


def test_checkpoint_path_of_the_native_size_is_resized(tmp_path, plugin):
    """`checkpoint_path=` with `img_size=` carries the weights over; stock raises a size mismatch."""
    model = redraw_(stock_in_plugin("vit_tiny_patch16_224", depth=1, num_classes=2))
    path = str(tmp_path / "weights.safetensors")
    save_file(model.state_dict(), path)
    args = dict(checkpoint_path=path, img_size=(96, 160), depth=1, num_classes=2)
    ours = timm.create_model("vit_tiny_patch16_224", **args)
    timm_resize.resize_(model, (96, 160))
    assert all(torch.equal(t, tensors(model)[n]) for n, t in tensors(ours).items())
    timm_resize.uninstall()
    try:
        with pytest.raises(RuntimeError, match="size mismatch"):
            stock("vit_tiny_patch16_224", **args)
    finally:
        timm_resize.install()


def stock_in_plugin(name, **kwargs):
    """Build without a size while the plugin is in, which is stock's own path."""
    return timm.create_model(name, **kwargs).eval()


def test_a_saved_size_is_the_source_and_the_argument_the_target(tmp_path):
    """`local-dir:` of a model saved at 96 by stock's own export, opened at 160, equals resizing the saved model."""
    model = redraw_(stock("vit_tiny_patch16_224", img_size=96, depth=1, num_classes=2))
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    ours = timm_resize.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=160)
    timm_resize.resize_(model, 160)
    assert all(torch.equal(t, tensors(model)[n]) for n, t in tensors(ours).items())


def test_features_only_takes_a_size_and_resizes(plugin):
    """A feature wrapper is built at a size, resizes, and both it and the model inside record it."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, features_only=True, depth=2, out_indices=(0, 1))
    assert [f.shape[-2:] for f in model.eval()(image((96, 96)))] == [(6, 6), (6, 6)]
    model.set_input_size((64, 96))
    assert [f.shape[-2:] for f in model(image((64, 96)))] == [(4, 6), (4, 6)]
    assert model._traits["img_size"] == model.model._traits["img_size"] == (64, 96)


def test_a_feature_wrapper_reports_the_new_reduction(plugin):
    """A change of patch size reaches the wrapper's own `feature_info`, as in a stock build with that patch size."""
    args = dict(features_only=True, depth=2, out_indices=(0, 1), img_size=96)
    model = timm.create_model("vit_tiny_patch16_224", **args)
    model.set_input_size(96, patch_size=8)
    assert model.feature_info.reduction() == [8, 8]
    want = timm.create_model("vit_tiny_patch16_224", **args, patch_size=8)
    assert model.feature_info.get_dicts() == want.feature_info.get_dicts()


@pytest.mark.parametrize("policy", ["keep", "scale"])
def test_a_window_policy_gives_the_same_windows_with_and_without_weights(policy):
    """The windows of a policy do not depend on whether weights were loaded, and are recorded for a stock rebuild."""
    args = dict(img_size=448, depths=(1, 1, 1, 1), embed_dim=16, num_heads=(1, 1, 1, 1), window_policy=policy)
    name, window = "swin_tiny_patch4_window7_224", {"keep": 7, "scale": 14}[policy]
    drawn = timm_resize.create_model(name, **args)
    small = {k: v for k, v in args.items() if k not in ("img_size", "window_policy")}
    overlay = dict(state_dict=stock(name, **small).state_dict())
    loaded = timm_resize.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    for model in (drawn, loaded):
        assert model.layers[0].blocks[0].window_size == (window, window)
        rebuilt = stock(name, **model._model_args)
        assert rebuilt.layers[0].blocks[0].window_size == (window, window)


def test_unknown_names_list_near_ones():
    """A misspelt model name is answered with registered names close to it."""
    with pytest.raises(
        RuntimeError, match=r"Unknown model \(vit_tini_patch16_224\)\. Near names: vit_tiny_patch16_224"
    ):
        timm_resize.create_model("vit_tini_patch16_224", img_size=96)


def test_resize_options_need_a_size():
    """An option about resizing without a size is an error, not silently dropped."""
    with pytest.raises(timm_resize.ResizeError, match="interpolation= is about a change of size. Give img_size="):
        timm_resize.create_model("vit_tiny_patch16_224", interpolation="bilinear")


def test_a_wrong_keyword_is_still_stocks_error():
    """A keyword that the constructor does not know raises stock's TypeError, with or without a size."""
    with pytest.raises(TypeError, match="nonsense"):
        timm_resize.create_model("vit_tiny_patch16_224", img_size=96, nonsense=1)


def test_a_class_of_the_users_own_that_takes_a_size_is_left_to_it(plugin):
    """A registered model without a handler whose constructor takes `img_size` is what stock builds."""
    from timm.models import build_model_with_cfg, register_model
    from timm.models._registry import _model_entrypoints, _model_to_module, _module_to_models

    class Mine(torch.nn.Module):
        def __init__(self, img_size=32, num_classes=2, in_chans=3, **_):
            super().__init__()
            self.num_classes, self.size = num_classes, img_size

    @register_model
    def my_own_model(pretrained=False, **kwargs):
        return build_model_with_cfg(Mine, "my_own_model", pretrained, **kwargs)

    try:
        assert timm.create_model("my_own_model", img_size=48).size == 48
    finally:
        _model_entrypoints.pop("my_own_model")
        _module_to_models[_model_to_module.pop("my_own_model")].discard("my_own_model")
