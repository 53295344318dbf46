"""What LeViT-like attention keeps of its biases in eval follows them, in teachers and in models at another size."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3

import timm_resize
from tests.helpers.examples import EXAMPLES
from tests.helpers.oracle import image, redraw_

FAMILIES = {
    "levit_128s": (160, 96),
    "levit_conv_128s": (208, 208),  # two of its stages keep their grids
    "efficientformer_l1": (160, 160),
    "efficientformerv2_s0": (128, 128),
    "efficientvit_m0": (128, 128),
    "tiny_vit_5m_224": (160, 160),
}
"""One example of each class that keeps biases, and a size."""


def built(name, size):
    """A model of the package at a size, in eval, whose outputs depend on its biases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return redraw_(timm_resize.create_model(name, img_size=size, **EXAMPLES.get(name, {}))).eval()


@torch.no_grad()
def change_(model, by):
    """Write to every bias table."""
    tables = [p for name, p in model.named_parameters() if name.endswith("attention_biases")]
    assert tables
    for table in tables:
        by(table)


@torch.no_grad()
def uncached(model, x):
    """What a copy gives whose caches are emptied, as stock does itself when a mode is set."""
    return copy.deepcopy(model).train().eval()(x)


WRITES = {
    "in place": lambda p: p.add_(torch.linspace(-1, 1, p.numel()).view_as(p)),
    "through data": lambda p: p.data.mul_(-2),
    "assigned": lambda p: [setattr(p, "data", p.data * 2) for _ in range(2)],
}


@pytest.mark.parametrize(("name", "size"), FAMILIES.items())
def test_eval_follows_the_biases(name, size):
    """Whatever writes to a table, the next forward in eval uses it; without a write the cache stays."""
    model, x = built(name, size), image(size)
    with torch.no_grad():
        before = model(x)
        for write in WRITES.values():
            change_(model, write)
            got = model(x)
            assert not torch.equal(got, before)
            torch.testing.assert_close(got, uncached(model, x))
            before = got
        kept = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
        assert all(cache for cache in kept)
        model(x)
        now = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
        assert all(a is b for a, b in zip(kept, now, strict=True))


def test_gradients_flow_in_eval():
    """A forward under no_grad and two backwards: each reaches the tables, alike."""
    model, x = built("levit_128s", (160, 96)), image((160, 96))
    with torch.no_grad():
        model(x)
    wants = []
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        wants.append([p.grad.clone() for n, p in model.named_parameters() if n.endswith("attention_biases")])
    assert all(g.abs().sum() > 0 for g in wants[0])
    torch.testing.assert_close(wants[0], wants[1])


@pytest.mark.parametrize("average", [lambda m: ModelEmaV2(m, decay=0.5), lambda m: ModelEmaV3(m, decay=0.5)])
def test_teachers_follow_their_average(average):
    """An averaged copy that stays in eval gives what its averaged weights give."""
    model, x = built("levit_128s", (160, 96)), image((160, 96))
    ema = average(model)
    with torch.no_grad():
        for _ in range(2):
            before = ema.module(x)
            change_(model, WRITES["in place"])
            ema.update(model)
            assert not torch.equal(ema.module(x), before)
            torch.testing.assert_close(ema.module(x), uncached(ema.module, x))


@torch.no_grad()
def test_at_size_and_back():
    """A table that is trained inside the block, or between two of them, counts inside and after."""
    model, x, y = redraw_(timm.create_model("levit_128s", num_classes=3)).eval(), image((224, 224)), image((208, 208))
    model(x)
    with timm_resize.at_size(model, 208):
        model(y)
        change_(model, WRITES["in place"])
        torch.testing.assert_close(model(y), uncached(model, y))
    torch.testing.assert_close(model(x), uncached(model, x))
    with timm_resize.at_size(model, 208):
        torch.testing.assert_close(model(y), uncached(model, y))
        held = model.stages[2].blocks[0].attn.attention_biases  # whose grid is the same at both sizes
        held.add_(1.0 + torch.arange(held.numel()).view_as(held))
    torch.testing.assert_close(model(x), uncached(model, x))


@torch.no_grad()
def test_copies_pickles_scripts_and_exports():
    """A copy and a pickle follow their own tables; scripts, traces, graphs and exports compute what the model does."""
    model, x = built("levit_128s", (160, 96)), image((160, 96))
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), want)
        change_(other, WRITES["in place"])
        torch.testing.assert_close(other(x), uncached(other, x))
        assert torch.equal(model(x), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(model)(x), want)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), want)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    change_(model, WRITES["in place"])
    torch.testing.assert_close(compiled(x), uncached(model, x))


def test_a_model_built_without_a_size_follows_too():
    """While the plugin is installed a model at its native size keeps no stale biases either; stock alone would."""
    for name in ("levit_128s", "tiny_vit_5m_224"):
        with timm_resize.install():
            model = redraw_(timm.create_model(name, **EXAMPLES[name])).eval()
        x = image((224, 224))
        with torch.no_grad():
            model(x)
            change_(model, WRITES["in place"])
            torch.testing.assert_close(model(x), uncached(model, x))


def test_a_copy_of_inference_mode_is_resized_as_any():
    """Weights that torch counts no writes of stay such: three resizes, at the end the values of the first."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    with torch.inference_mode():
        inferred = copy.deepcopy(model)
    timm_resize.resize_(model, 256)
    for inside in (False, True):
        with torch.inference_mode(inside):
            for size in (256, 224, 192, 256):
                timm_resize.resize_(inferred, size)
                assert inferred.pos_embed.is_inference()
        assert torch.equal(inferred.pos_embed, model.pos_embed)
        with torch.no_grad():
            torch.testing.assert_close(inferred(image((256, 256))), model(image((256, 256))))
            with timm_resize.at_size(inferred, (96, 128)):
                assert inferred(image((96, 128))).isfinite().all()
