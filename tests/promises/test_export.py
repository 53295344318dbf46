"""Compiled and exported models: one compilation per size, and no interpolation left in a graph."""

from __future__ import annotations

import io
import warnings

import pytest
import torch

import timm_resize
from tests.helpers.examples import mostly_slow
from tests.helpers.oracle import image, redraw_, stock

MODELS = {
    "vit_tiny_patch16_224": {"depth": 1, "embed_dim": 48},
    "beit_base_patch16_224": {"depth": 1, "embed_dim": 48, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1), "embed_dim": 24},
    "levit_128s": {"depth": (1, 1, 1)},
    "mixer_s32_224": {"mlp_ratio": (0.125, 0.25)},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1), "embed_dim": 32},
}
TRANSFORMERS = ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"]
SIZE = (192, 256)
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6)


def resized(name):
    model = redraw_(stock(name, **MODELS[name]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm_resize.resize_(model, SIZE)
    return model


@pytest.mark.parametrize("name", mostly_slow(MODELS, "swin_tiny_patch4_window7_224", "mixer_s32_224"))
def test_export_has_no_interpolation(name):
    """The exported program computes what the model does, and samples nothing."""
    if OLD and name == "levit_128s":
        pytest.skip("torch before 2.6 leaves fake tensors in the cache of stock's attention when it exports")
    model = resized(name)
    with torch.no_grad():
        program = torch.export.export(model, (image(SIZE),))
        torch.testing.assert_close(program.module()(image(SIZE)), model(image(SIZE)), rtol=1e-4, atol=1e-4)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not [t for t in targets if "upsample" in t or "interpolate" in t or "grid_sampler" in t]


@pytest.mark.skipif(OLD, reason="torch before 2.6 does not export these models to ONNX, at their own size either")
@pytest.mark.parametrize("name", mostly_slow(["levit_128s", *TRANSFORMERS], "vit_tiny_patch16_224"))
def test_onnx(name, tmp_path):
    """onnxruntime computes the same from the exported file, in whose graph nothing is resized."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, file = resized(name), tmp_path / "model.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (image(SIZE),), str(file), dynamo=True, verbose=False)
        want = model(image(SIZE))
    assert not {n.op_type for n in onnx.load(str(file)).graph.node} & {"Resize", "Upsample", "GridSample"}
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: image(SIZE).numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-3)


def test_a_size_of_multisize_exports():
    """The model of each size is an ordinary one: it exports like one."""
    multi = timm_resize.MultiSize(
        redraw_(stock("swin_tiny_patch4_window7_224", **MODELS["swin_tiny_patch4_window7_224"]))
    )
    for size in ((224, 224), SIZE):
        with torch.no_grad():
            program = torch.export.export(multi.at(size), (image(size),))
            torch.testing.assert_close(program.module()(image(size)), multi(image(size)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", mostly_slow(TRANSFORMERS, "vit_tiny_patch16_224"))
def test_compiled_once_per_size(name):
    """A compiled model is resized through its wrapper, compiles again once per size, and then no more."""
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = redraw_(stock(name, **MODELS[name]))
    compiled = torch.compile(model, backend=backend, dynamic=False)
    counts = []
    with torch.no_grad():
        for size in ((224, 224), SIZE, (96, 96)):
            timm_resize.resize_(compiled, size)
            for _ in range(3):
                torch.testing.assert_close(compiled(image(size)), model(image(size)))
            counts.append(len(compilations))
    per_size = counts[0]
    assert counts == [per_size, 2 * per_size, 3 * per_size]


def test_a_scripted_model_is_of_the_new_size():
    """Scripting, saving and loading after a resize gives the resized model."""
    model = resized("vit_tiny_patch16_224")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(model), buffer)
        buffer.seek(0)
        again = torch.jit.load(buffer)
    with torch.no_grad():
        torch.testing.assert_close(again(image(SIZE)), model(image(SIZE)))
