"""`install` and `uninstall`: everything is replaced or nothing, and whatever others put there stays."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from safetensors.torch import save_file
from timm import create_model as early_create_model
from timm.models import _builder, _factory, _helpers, resolve_model_input_args
from timm.models.vision_transformer import VisionTransformer

import timm_resize
from tests.helpers.timm_state import timm_objects
from timm_resize.plugin import install
from timm_resize.plugin.patch import Exchange
from timm_resize.plugin.resume import READERS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plugin():
    """The plugin, installed for one test."""
    with timm_resize.install():
        yield


def test_a_create_model_imported_earlier_is_reached(plugin):
    """Names bound to timm's create_model before the plugin take `img_size` for a model that stock refuses."""
    for create in (early_create_model, timm.create_model, timm.models.create_model, _factory.create_model):
        assert create("test_resnet", img_size=96, num_classes=2)._traits["resized_img_size"] == (96, 96)


def test_uninstall_leaves_every_object_of_timm_identical():
    """After uninstall every module attribute, class attribute and code object is the one from before."""
    before = timm_objects()
    handle = timm_resize.install()
    assert timm_objects() != before
    timm.create_model("test_resnet", img_size=96, num_classes=2).set_input_size(64)
    handle.uninstall()
    assert timm_objects() == before


def test_install_nests():
    """Two installs need two uninstalls; one more is a no-op."""
    before = timm_objects()
    with timm_resize.install():
        with timm_resize.install():
            pass
        timm.create_model("test_resnet", img_size=96)
    assert timm_objects() == before
    timm_resize.uninstall()
    assert timm_objects() == before


def test_install_is_thread_safe():
    """Many threads installing, creating and uninstalling leave timm as it was."""
    before = timm_objects()
    errors = []

    def work():
        try:
            for _ in range(5):
                with timm_resize.install():
                    model = timm.create_model("test_resnet", img_size=96, device="meta")
                    assert model._traits["resized_img_size"] == (96, 96)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert timm_objects() == before


def test_the_script_helper_of_timm_is_unchanged(plugin):
    """`resolve_model_input_args` passes through the same function and still returns the size."""
    args = resolve_model_input_args("vit_tiny_patch16_224", img_size=96)
    timm_resize.uninstall()
    try:
        assert args == resolve_model_input_args("vit_tiny_patch16_224", img_size=96)
    finally:
        timm_resize.install()
    assert args["img_size"] == 96


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_models_pickle_and_copy_without_the_method_on_the_instance(name, plugin):
    """`set_input_size` is on the class: instances deepcopy and pickle, and hold no function of ours."""
    model = timm.create_model(name, img_size=96, num_classes=2)
    assert "set_input_size" not in model.__dict__
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.set_input_size(64)
        assert timm_resize.plan_resize(again).new_size == (64, 64)
    assert timm_resize.plan_resize(model).new_size == (96, 96)


def test_every_model_class_and_wrapper_has_the_method(plugin):
    """All classes of timm with a classifier, and all feature wrappers, have `set_input_size`."""
    from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet, FeatureListNet

    classes = {
        c
        for n, m in sys.modules.items()
        if n.startswith("timm.models.")
        for c in vars(m).values()
        if isinstance(c, type) and issubclass(c, torch.nn.Module) and hasattr(c, "reset_classifier")
    }
    assert len(classes) > 80
    for cls in classes | {FeatureDictNet, FeatureGetterNet, FeatureHookNet, FeatureListNet}:
        assert callable(getattr(cls, "set_input_size", None)), cls


def test_the_method_takes_stock_positional_arguments(plugin):
    """Positional order is that of the class's stock method."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    model.set_input_size((96, 128), 8)
    assert model.patch_embed.grid_size == (12, 16)
    assert model.patch_embed.proj.kernel_size == (8, 8)


def test_install_names_what_this_timm_lacks(monkeypatch):
    """With a name of timm gone, `install` says which it is, and timm is untouched; so for each name in the tables."""
    for path in (*(install.REPLACED.keys() - install.OPTIONAL), *install.RELIED_ON):
        module, name = path.rsplit(".", 1)
        function = getattr(importlib.import_module(module), name)
        with monkeypatch.context() as patch:
            for place in [m for n, m in sys.modules.items() if n.startswith("timm") and vars(m).get(name) is function]:
                patch.delattr(place, name)
            before = timm_objects()
            with pytest.raises(timm_resize.ResizeError) as caught:
                timm_resize.install()
            assert timm_objects() == before
            assert not hasattr(timm.models.resnet.ResNet, "set_input_size")
        assert str(caught.value) == (
            f"timm {timm.__version__} has no {path}, which timm_resize relies on. "
            "Use timm 1.0.31, or a newer timm_resize."
        )
    assert timm.create_model("test_resnet", num_classes=2).num_classes == 2


@pytest.mark.parametrize("path", [*sorted(install.OPTIONAL), "timm.task._helpers._load_train_checkpoint"])
def test_install_leaves_out_what_a_timm_need_not_have(path, monkeypatch, caplog):
    """Without a function of `timm.task`, or what it reads files with, the rest is installed, and the log says so."""
    before = timm_objects()
    module, name = path.rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
    for place in [m for n, m in sys.modules.items() if n.startswith("timm") and vars(m).get(name) is function]:
        monkeypatch.delattr(place, name)
    with timm_resize.install():
        assert timm.create_model("test_resnet", img_size=96, device="meta")._traits["resized_img_size"] == (96, 96)
    lost = sorted(p for p in install.OPTIONAL if path in (p, *READERS.get(p, ())))
    assert sorted(r.args[1] for r in caplog.records) == lost
    monkeypatch.undo()
    assert timm_objects() == before


def test_install_is_all_or_nothing(monkeypatch):
    """Whichever replacement fails, timm is as before, and the next install works."""
    before = timm_objects()
    for fail_at in range(len(install.REPLACED)):
        left = [fail_at]

        def put_in(self, left=left, put_in=Exchange.put_in):
            if not left[0]:
                raise MemoryError("injected")
            left[0] -= 1
            put_in(self)

        with monkeypatch.context() as patch:
            patch.setattr(Exchange, "put_in", put_in)
            with pytest.raises(MemoryError, match="injected"):
                timm_resize.install()
        assert timm_objects() == before
    with timm_resize.install():
        assert timm.create_model("test_resnet", img_size=96, device="meta")._traits["resized_img_size"] == (96, 96)


def counting(function, calls, wraps):
    """Return somebody else's wrapper: it counts, then hands on."""

    def wrapper(*args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    return functools.wraps(function)(wrapper) if wraps else wrapper


WRAPPED = [
    (timm, "create_model"),
    (_factory, "create_model"),
    (_builder, "load_pretrained"),
    (_helpers, "load_checkpoint"),
    (safetensors.torch, "load_file"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a small ViT's weights."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2).state_dict(), path)
    return str(path)


def build(place, weights, img_size=None):
    """Read the file through the wrapped name."""
    size = {} if img_size is None else {"img_size": img_size}
    if place is _helpers:
        model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2, **size)
        _helpers.load_checkpoint(model, weights)
        return model
    create = place.create_model if hasattr(place, "create_model") else timm.create_model
    overlay = {"file": weights, "num_classes": 2}
    return create("vit_tiny_patch16_224", True, None, overlay, depth=1, num_classes=2, **size)


@pytest.mark.parametrize("wraps", [True, False], ids=["wraps", "opaque"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("place", "name"), WRAPPED, ids=lambda v: getattr(v, "__name__", v))
def test_a_wrapper_of_somebody_elses_is_called_and_stays(place, name, when, wraps, weights, monkeypatch):
    """A wrapper put on a name of timm or safetensors before or after ours is called, and is there after uninstall."""
    calls = []
    wrapper = counting(getattr(place, name), calls, wraps)
    if when == "before":
        monkeypatch.setattr(place, name, wrapper)
    with timm_resize.install():
        if when == "after":
            monkeypatch.setattr(place, name, wrapper)
        model = build(place, weights, img_size=96)
        assert model.pos_embed.shape == (1, 37, 192)
        assert len(calls) == 1
        build(place, weights)
        assert len(calls) == 2
    assert getattr(place, name) is wrapper
    assert build(place, weights).pos_embed.shape == (1, 197, 192)
    assert len(calls) == 3


@pytest.mark.parametrize("installed", [False, True])
def test_another_thread_sees_timm_unchanged_while_a_file_is_read(installed, weights, monkeypatch):
    """In the middle of `timm_resize.create_model(pretrained=True, img_size=…)` every object of timm is as usual."""
    seen = []

    def look(*args, **kwargs):
        thread = threading.Thread(target=lambda: seen.append(timm_objects()))
        thread.start()
        thread.join()
        return load(*args, **kwargs)

    load = _builder.load_pretrained
    monkeypatch.setattr(_builder, "load_pretrained", look)
    if installed:
        timm_resize.install()
    try:
        usual = timm_objects()
        timm_resize.create_model(
            "vit_tiny_patch16_224",
            pretrained=True,
            img_size=96,
            depth=1,
            num_classes=2,
            pretrained_cfg_overlay={"file": weights, "num_classes": 2},
        )
        assert seen == [usual]
    finally:
        if installed:
            timm_resize.uninstall()


def test_a_method_that_somebody_put_on_a_class_meanwhile_stays(monkeypatch):
    """`uninstall` takes off our `set_input_size` only, not one that has replaced it."""
    own = VisionTransformer.set_input_size
    theirs = lambda self: None  # noqa: E731
    with timm_resize.install():
        assert VisionTransformer.set_input_size is not own
        monkeypatch.setattr(VisionTransformer, "set_input_size", theirs)
    assert VisionTransformer.set_input_size is theirs
    monkeypatch.undo()
    VisionTransformer.set_input_size = own


def test_docs_print_the_table_of_what_is_replaced():
    """docs/design.md lists exactly what `install` replaces."""
    text = (ROOT / "docs" / "design.md").read_text()
    rows = [line.split("|")[1].strip(" `") for line in text.splitlines() if line.startswith("| `timm.")]
    assert rows == list(install.REPLACED)
