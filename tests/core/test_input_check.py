"""Models that would run silently wrong at a size they are not set to say so instead."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import timm
import torch

import timm_resize
from tests.helpers.examples import EXAMPLES, example, mostly_slow, sweep
from tests.helpers.oracle import assert_same_structure, first, image, redraw_, stock
from timm_resize.core.find import current_size

SILENT = {
    "crossvit_9_240": (256, 256),
    "hiera_small_abswin_256": (128, 512),
    "lambda_resnet26rpt_256": (128, 512),
    "levit_128s": (112, 448),
    "mvitv2_tiny": (160, 160),
    "pit_ti_224": (16, 16),
    "vitamin_small_224": (16, 16),
    "volo_d1_224": (16, 16),
}
"""Sizes at which stock's model of another size runs, and computes something else than a model of that size."""

RANGES = {
    "crossvit_9_240": (240, 240),  # interpolated to both branches' sizes
    "hiera_small_abswin_256": (253, 256),  # 64 cells of 4 pixels, rounded up
    "lambda_resnet26rpt_256": (241, 256),  # a map of 16 cells of 16 pixels, rounded up
    "levit_128s": (209, 224),  # 14 cells of 16 pixels, rounded up
    "mvitv2_tiny": (221, 224),  # 56 cells of 4 pixels, rounded up
    "pit_ti_224": (224, 231),  # 27 kernels of 16 pixels, 8 apart
    "vitamin_small_224": (209, 224),  # 14 cells of 16 pixels, rounded up
    "volo_d1_224": (223, 238),  # 14 pairs of cells of 8 pixels after a stem that rounds up to 2
}
"""The lowest and the highest side that gives each model the grid that its weights are for."""

PADDED = {"efficientvit_m0"}
"""Attention in windows, which stock pads to the window that the model is set to: a choice, not a mistake."""

REFUSALS = (RuntimeError, AssertionError, ValueError, ZeroDivisionError)
"""Our check's, and those of stock's forward and of torch."""


def guarded(name, size=None, **kwargs):
    model = redraw_(stock(name, **EXAMPLES[name], **kwargs)) if kwargs else example(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm_resize.resize_(model, size or other_size(model))
    return model


def of_the_plugin(name):
    """Return an example as the plugin builds it, with the weights of `example`."""
    with timm_resize.install():
        model = timm.create_model(name, **EXAMPLES[name]).eval()
    model.load_state_dict(example(name).state_dict())
    return model


def other_size(model):
    return timm_resize.nearest_sizes(model, tuple(side + 64 for side in current_size(model)))[0]


@pytest.mark.parametrize("name", sweep(*(name for name in EXAMPLES if name not in PADDED), of=3))
def test_runs_only_where_right(name):
    """At a size it is not set to a model raises, or computes what the same model resized to that size computes."""
    model = of_the_plugin(name)
    h, w = current_size(model) or (224, 224)
    for size in ((16, 16), (h // 2, 2 * w), (h - 64, w - 64)):
        if size[0] * size[1] > 300**2:
            continue
        with torch.no_grad():
            try:
                output = first(model(image(size)))
            except REFUSALS:
                continue
            other = copy.deepcopy(model)
            timm_resize.resize_(other, size)
            torch.testing.assert_close(output, first(other(image(size))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", mostly_slow(RANGES, *(RANGES.keys() - {"mvitv2_tiny", "volo_d1_224"})))
@torch.inference_mode()
def test_the_range_of_sizes(name):
    """The outermost sizes of the same grid give stock's own output, bit for bit; one pixel more or less is refused."""
    low, high = RANGES[name]
    ours, theirs = of_the_plugin(name), example(name)
    for size in ((low, high), (high, low)):
        assert torch.equal(first(ours(image(size))), first(theirs(image(size)))), size
    for size in ((low - 1, high), (high, low - 1), (high + 1, low), (low, high + 1)):
        with pytest.raises(timm_resize.InvalidSizeError, match=r"is set, and the input is \d+x\d+, where it takes"):
            ours(image(size))


@pytest.mark.parametrize(("name", "size"), SILENT.items())
@torch.inference_mode()
def test_stock_is_silent_and_ours_is_not(name, size):
    """Stock's model runs there; ours names both sizes and the call to make."""
    assert first(example(name)(image(size))).isfinite().all()
    model = guarded(name, 320 if name == "hiera_small_abswin_256" else None)
    set_to = current_size(model)
    with pytest.raises(timm_resize.InvalidSizeError, match=rf"img_size=\({set_to[0]}, {set_to[1]}\) is set") as caught:
        model(image((set_to[0] // 2, set_to[1] * 2) if 2 * size[0] < size[1] else size))
    assert "set_input_size or timm_resize.resize_" in str(caught.value)


@pytest.mark.parametrize("name", mostly_slow(SILENT, "pit_ti_224", "hiera_small_abswin_256"))
def test_copies_follow(name):
    """A copy and a pickled model keep the check, and a resize moves it without a second one."""
    model = guarded(name)
    size, x = current_size(model), image(current_size(model))
    with torch.inference_mode():
        want = first(model(x))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        timm_resize.resize_(other, 256 if name not in ("hiera_small_abswin_256", "lambda_resnet26rpt_256") else 384)
        new = current_size(other)
        assert new != size
        with torch.inference_mode():
            with pytest.raises(timm_resize.InvalidSizeError, match=rf"img_size=\({new[0]}, {new[1]}\) is set"):
                other(x)
            assert first(other(image(new))).isfinite().all()
            assert torch.equal(first(model(x)), want)
            timm_resize.resize_(other, size)
            assert torch.equal(first(other(x)), want)  # there and back
        assert max(len(m._forward_pre_hooks) for m in other.modules()) == 1


def test_features_are_guarded_too():
    """`forward_intermediates` and `features_only` pass the same check."""
    model = guarded("mvitv2_tiny", features_only=True)
    with pytest.raises(timm_resize.InvalidSizeError, match="is set, and the input is 160x160"):
        model(image((160, 160)))
    plain = guarded("pit_ti_224")
    with pytest.raises(timm_resize.InvalidSizeError, match="is set, and the input is 16x16"):
        plain.forward_intermediates(image((16, 16)))


@pytest.mark.parametrize("name", mostly_slow(["pit_ti_224", "levit_128s", "vitamin_small_224"], "pit_ti_224"))
def test_scripts_and_traces(name):
    """A guarded model compiles under torch.jit as stock's does; a script keeps the check."""
    model = guarded(name)
    x = image(current_size(model))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        script, trace = torch.jit.script(model), torch.jit.trace(model, x)
        want = model(x)
        torch.testing.assert_close(script(x), want)
        torch.testing.assert_close(trace(x), want)
        with pytest.raises(torch.jit.Error, match="is set, and the input is"):
            script(image((16, 16)))


@pytest.mark.parametrize("name", ["levit_128s", "pit_ti_224"])
def test_symbolic_tracing(name):
    """torch.fx traces a guarded model as it traces stock's; the graph computes the same."""
    from timm.models._features_fx import GraphExtractNet

    model = guarded(name)
    x = image(current_size(model))
    last = [path for path, _ in model.named_modules() if path.startswith(("stages.", "transformers."))][-1]
    graph = GraphExtractNet(copy.deepcopy(model), [last])
    seen = []
    model.get_submodule(last).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.inference_mode():
        model(x)
        torch.testing.assert_close(graph(x), seen[0])


@pytest.mark.parametrize("name", mostly_slow(["pit_ti_224", "mvitv2_tiny"], "pit_ti_224"))
def test_exports(name):
    """torch.export and torch.compile take a guarded model; no check is left in the graph."""
    model = guarded(name).eval()
    x = image(current_size(model))
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), want)


def test_a_lenient_vision_transformer():
    """With `strict_img_size=False` a grid of as many patches would take positions of another place."""
    model = redraw_(stock("vit_tiny_patch16_224", depth=1))
    model.patch_embed.strict_img_size = False  # as users set it
    assert first(model(image((112, 448)))).isfinite().all()
    timm_resize.resize_(model, 256)
    with pytest.raises(timm_resize.InvalidSizeError, match=r"img_size=\(256, 256\) is set, and the input is 128x512"):
        model(image((128, 512)))


@pytest.mark.parametrize("name", ["crossvit_9_240", "hiera_small_abswin_256", "levit_128s", "pit_ti_224"])
def test_guarded_models_of_the_plugins_are_stocks(name):
    """While the plugin is installed a model built without a size is stock's, with a guard."""
    with timm_resize.install():
        torch.manual_seed(0)
        ours = timm.create_model(name, **EXAMPLES[name]).eval()
    torch.manual_seed(0)
    theirs = stock(name, **EXAMPLES[name])
    assert_same_structure(ours, theirs)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(timm_resize.InvalidSizeError, match="is set, and the input is"):
        ours(image(SILENT[name]))
