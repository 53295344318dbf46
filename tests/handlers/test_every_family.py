"""Every registered model family against stock timm. Parametrised over the registry: a new family edits nothing here."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from safetensors.torch import save_file

import timm_resize
import timm_resize.core.transaction
from tests.helpers.examples import each_with, mostly_slow, sweep
from tests.helpers.oracle import (
    assert_close,
    assert_same_structure,
    attributes,
    first,
    image,
    redraw_,
    sizes_for,
    stock,
    tensors,
)
from timm_resize.core.registry import handlers

SMALLER = {name: dict(kwargs) for h in handlers() for name, kwargs in h.examples.items()}
STATEFUL = sorted({name for h in handlers() if h.state for name in h.examples})
RESIZABLE = sorted({name for h in handlers() if hasattr(h.cls, "set_input_size") for name in h.examples})
"""Examples of the classes that have a method for it in stock."""

COMPARED = {
    # stock's constructor has no size, ignores it, or makes tables that its own forward cannot use
    "EfficientFormer": (0, 0),
    "MultiScaleVit": (0, 0),
    "TinyVit": (0, 0),
    # stock's forward takes square grids only
    "ConVit": (2, 0),
    "Nest": (2, 0),
    # stock's constructor and forward round one of the four sizes differently
    "CrossVit": (3, 0),
    "Levit": (3, 0),
    # stock builds the model at another size, and has no way to resize the tensors of a checkpoint
    "Cait": (4, 0),
    "EfficientFormerV2": (4, 0),
    "GlobalContextVit": (4, 0),
    "Hiera": (4, 0),
    "MlpMixer": (4, 0),
    "PoolingVisionTransformer": (4, 0),
    "VisionTransformerSAM": (4, 0),
    "Visformer": (4, 0),
    "VOLO": (4, 0),
    "botnet26t_256": (4, 0),
    "lambda_resnet26rpt_256": (4, 0),
    "lamhalobotnet50ts_256": (4, 0),
    "resnet50_clip": (4, 0),
    "hiera_small_abswin_256": (4, 4),  # no table of it has a size
}
"""Of the four sizes, at how many stock builds and runs an example, and loads a checkpoint of its own size, by class or
by name. All others compare at all four, so that no comparison is lost unnoticed."""


RESIZED_BY_STOCK = {
    "Beit",
    "EfficientVitMsra",
    "Eva",
    "MaxxVit",
    "SwinTransformer",
    "SwinTransformerV2",
    "SwinTransformerV2Cr",
    "VisionTransformer",
    "VisionTransformerRelPos",
}
"""Classes of stock that have `set_input_size`."""


def compared(name: str) -> tuple[int, int]:
    """Return the sizes at which an example has to compare with a fresh build of stock, and with a checkpoint in it."""
    classes = (cls.__name__ for cls in type(build(name, device="meta")).__mro__)
    return next((COMPARED[key] for key in (name, *classes) if key in COMPARED), (4, 4))


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(name: str, **kwargs):
    """Build an example with stock timm, three classes, shrunk as its family says."""
    return stock(name, **{"num_classes": 3, **SMALLER[name], **kwargs})


@torch.no_grad()
def built_by_stock(name: str, size: tuple[int, int]) -> torch.nn.Module | None:
    """Return stock's model built at `size`, None where it cannot be built or run there."""
    try:
        model = build(name, img_size=size)
        copy.deepcopy(model)(image(size))
    except (TypeError, RuntimeError, AssertionError, ValueError, IndexError):
        return None
    return model


def in_turn(turn, of):
    """Parametrise over the examples; promises that one mechanism keeps for every family take turns by default."""
    return pytest.mark.parametrize("name", sweep(*STATEFUL, turn=turn, of=of))


@functools.lru_cache(maxsize=48)
def native(name: str) -> torch.nn.Module:
    """Return an example of its own size, with three classes, redrawn; nobody changes it."""
    return redraw_(build(name))


def test_what_stock_resizes_is_known():
    """A class that gets the method is noticed, and then compared."""
    assert {h.cls.__name__ for h in handlers() if h.examples and hasattr(h.cls, "set_input_size")} == RESIZED_BY_STOCK


@pytest.mark.parametrize("name", sweep(*RESIZABLE))
def test_resize_equals_stock_set_input_size(name):
    """Wherever stock has `set_input_size`, ours gives the same tensors, structure, records and outputs."""
    model = native(name)
    for size in sizes_for(model):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        theirs.set_input_size(img_size=size)
        timm_resize.resize_(ours, size)
        assert_close(ours, theirs)
        assert_same_structure(ours, theirs, ignore={"feature_info"})  # which stock leaves at the old reduction
        assert ours._traits == theirs._traits
        assert ours._model_args == theirs._model_args
        with torch.inference_mode():
            x = image(size)
            torch.testing.assert_close(first(ours(x)), first(theirs(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*sweep(*sorted({*STATEFUL} - {*RESIZABLE}), of=4), *sweep(*RESIZABLE, of=6)])
def test_create_model_from_a_checkpoint_equals_stock(name, tmp_path):
    """`create_model(img_size=S)` from a native-size checkpoint equals stock's, in structure where stock only builds."""
    model, path = native(name), str(tmp_path / "model.safetensors")
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    built = loaded = 0
    can_load = True
    for size in sizes_for(model):
        theirs = built_by_stock(name, size)
        if theirs is None:
            continue
        args = dict(
            img_size=size, num_classes=3, pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=3)
        )
        ours = timm_resize.create_model(name, **SMALLER[name], **args).eval()
        built += 1
        if can_load:
            try:
                theirs = build(name, **args)
            except (TypeError, RuntimeError, AssertionError):
                can_load = False
        assert_same_structure(ours, theirs)
        if not can_load:
            continue
        assert_close(ours, theirs)
        assert ours._traits == theirs._traits
        assert ours._model_args == theirs._model_args
        with torch.inference_mode():
            x = image(size)
            torch.testing.assert_close(first(ours(x)), first(theirs(x)), atol=1e-5, rtol=1e-5)
        loaded += 1
    assert (built, loaded) == compared(name)


@in_turn(1, 6)
def test_buffers_reinitialise_to_themselves(name):
    """timm's `init_non_persistent_buffers` after a resize changes nothing, non-square too where stock can run it."""
    model = native(name)
    large, _, *wide = sizes_for(model)
    for size in (large, *(s for s in wide if built_by_stock(name, s) is not None)):
        resized = copy.deepcopy(model)
        timm_resize.resize_(resized, size)
        before = {n: b.clone() for n, b in resized.named_buffers()}
        for module in resized.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
        after = dict(resized.named_buffers())
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)


@in_turn(2, 6)
def test_untouched_chain_is_path_independent(name):
    """There and back restores every bit; a detour changes nothing; the same size is an empty plan."""
    model = native(name)
    large, small, *_ = sizes_for(model)
    straight, detour, back = (copy.deepcopy(model) for _ in range(3))
    timm_resize.resize_(straight, large)
    timm_resize.resize_(detour, small)
    timm_resize.resize_(detour, large)
    timm_resize.resize_(back, large)
    timm_resize.resize_(back, timm_resize.plan_resize(model).new_size)
    for duplicate, want in ((detour, straight), (back, model)):
        a, b = tensors(duplicate), tensors(want)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert attributes(duplicate) == attributes(want)
    assert not timm_resize.plan_resize(straight, large)


@in_turn(3, 6)
def test_parameters_keep_their_identity(name):
    """The same Parameter objects, dtype, `requires_grad`; resized ones still take a gradient."""
    model = copy.deepcopy(native(name))
    size = sizes_for(model)[1]
    resized = {c.key for c in timm_resize.plan_resize(model, size) if c.kind == "parameter"}
    before = dict(model.named_parameters())
    frozen = sorted(resized)[:1]
    for n in frozen:
        before[n].requires_grad_(False)
    timm_resize.resize_(model, size)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[n] is after[n] for n in before)
    assert all(after[n].requires_grad == (n not in frozen) for n in after)
    first(model.train()(image(size, batch=2))).float().square().mean().backward()
    for n in resized - set(frozen):
        assert after[n].grad is not None, n
        assert after[n].grad.shape == after[n].shape, n


SOME_WRITES = each_with(8, [name for name in sweep(*STATEFUL, of=6) if isinstance(name, str)])
EVERY_WRITE = each_with(None, mostly_slow(STATEFUL))


@pytest.mark.parametrize(("name", "points"), SOME_WRITES + EVERY_WRITE)
def test_a_failing_write_leaves_everything(name, points, monkeypatch, record_property):
    """An exception at a single write, any of them, leaves every tensor object, value and attribute as before."""
    model = copy.deepcopy(native(name))
    size = sizes_for(model)[0]
    objects = {n: (t, t.data_ptr(), t.clone()) for n, t in tensors(model).items()}
    python = attributes(model)
    records = copy.deepcopy((model._traits, model._model_args))
    steps = {"done": 0, "last": -1}  # never

    def write(do):
        if steps["done"] == steps["last"]:
            raise RuntimeError("injected")
        steps["done"] += 1
        do()

    monkeypatch.setattr(timm_resize.core.transaction, "_write", write)
    timm_resize.resize_(copy.deepcopy(model), size)
    last, count = steps["done"] - 1, min(points or steps["done"], steps["done"])
    assert count >= 1
    for point in {at * last // max(count - 1, 1) for at in range(count)}:
        steps.update(done=0, last=point)
        with pytest.raises(RuntimeError, match="^injected$"):
            timm_resize.resize_(model, size)
        now = tensors(model)
        assert now.keys() == objects.keys()
        for n, (tensor, pointer, value) in objects.items():
            assert now[n] is tensor, n
            assert tensor.data_ptr() == pointer, n
            assert torch.equal(tensor, value), n
        assert attributes(model) == python
        assert (model._traits, model._model_args) == records
        assert "_resize_chain" not in model.__dict__
    record_property("faults", count)


@in_turn(4, 6)
def test_plans_work_on_the_meta_device(name):
    """A plan made on the meta device lists the same changes as one made on the real model."""
    model = native(name)
    meta = build(name, device="meta")
    for size in sizes_for(meta):
        assert [
            (c.key, c.kind, c.new, c.how) for c in timm_resize.plan_resize(meta, size) if c.kind != "attribute"
        ] == [(c.key, c.kind, c.new, c.how) for c in timm_resize.plan_resize(model, size) if c.kind != "attribute"]
    timm_resize.resize_(meta, size)
    assert all(p.is_meta for p in meta.parameters())


@in_turn(5, 6)
def test_a_resized_model_copies_and_pickles(name, tmp_path):
    """deepcopy and torch.save carry a resized model, and the copy still remembers the original tensors."""
    model = copy.deepcopy(native(name))
    own_size, size = timm_resize.plan_resize(model).new_size, sizes_for(model)[1]
    want = {n: t.clone() for n, t in tensors(model).items()}
    timm_resize.resize_(model, size)
    torch.save(model, tmp_path / "model.pt")
    for duplicate in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert all(torch.equal(t, tensors(model)[n]) for n, t in tensors(duplicate).items())
        timm_resize.resize_(duplicate, own_size)
        assert all(torch.equal(t, want[n]) for n, t in tensors(duplicate).items())
