"""Models of transformers: a new model of the changed configuration is the oracle, and the library's interpolation."""

from __future__ import annotations

import copy

import pytest
import torch

import timm_resize

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.helpers.oracle import assert_same_structure
from tests.helpers.transformers_models import CASES

QUICK = {
    "vit-classifier",
    "deit",
    "dinov2-backbone",
    "dinov2-registers",
    "dinov3",
    "beit",
    "data2vec-shared-classifier",
}
QUICK |= {"clip", "siglip", "swin", "swinv2", "mae-pretraining", "vitdet", "dpt-dinov2", "depth-anything"}
"""One class of each architecture; the others of it are its embeddings and blocks under other heads."""

EACH = pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES])


@EACH
def test_as_a_new_model(name):
    """Shapes, buffers and attributes are those of a new model at each size; back at the first, every bit is as before.

    The caller's configuration is not written to.
    """
    case = CASES[name]
    model = case.model()
    theirs, before, was = copy.deepcopy(model), model.config, copy.deepcopy(model.config)
    for size in case.sizes:
        timm_resize.resize_(model, size)
        config = case.sized(was, size)
        assert model.config == config
        assert_same_structure(model, case.cls(config).eval())
        assert all(t.isfinite().all() for t in case.run(copy.deepcopy(model), size))
    timm_resize.resize_(model, case.native)
    assert_same_structure(model, theirs)
    assert model.config == theirs.config
    assert all(map(torch.equal, model.state_dict().values(), theirs.state_dict().values()))
    assert before == was


@EACH
def test_values(name):
    """Outputs are those of the unresized model, which interpolates in its forward."""
    case = CASES[name]
    if not case.exact:
        pytest.skip("the library does not interpolate all of it in a forward")
    model = case.model()
    theirs = copy.deepcopy(model)
    for size in case.sizes[:2]:
        timm_resize.resize_(model, size)
        got, want = case.run(model, size), case.run(theirs, size, interpolate=True)
        assert len(got) == len(want) > 0
        for ours, other in zip(got, want, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@EACH
def test_saved_and_opened(name, tmp_path):
    """What the library saves, it opens at its size with equal weights and outputs."""
    case = CASES[name]
    model = case.model()
    size = case.sizes[-1]
    timm_resize.resize_(model, size)
    model.save_pretrained(tmp_path)
    opened = case.cls.from_pretrained(tmp_path).eval()
    assert tuple(torch.tensor(case.get(opened.config)).expand(2).tolist()) == size
    assert opened.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, opened.state_dict().values(), model.state_dict().values()))
    for ours, other in zip(case.run(model, size), case.run(opened, size), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


@EACH
def test_not_square(name):
    """A size that is not square works, or is refused before anything is written, with the reason."""
    case = CASES[name]
    if case.oblong:
        pytest.skip("the library has models of such sizes")
    model = case.model()
    state, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config)
    height, width = case.native
    with pytest.raises(timm_resize.InvalidSizeError, match="is not square, and ") as caught:
        timm_resize.resize_(model, (height + 2 * case.patch, width))
    assert caught.value.nearest
    assert model.config == config
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
