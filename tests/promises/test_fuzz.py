"""A fixed short run of the fuzz, and that its judge sees what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import timm_resize.core.values
from tests.helpers.snapshots import WrongError, unchanged
from tests.helpers.trial import WAYS, Choices, take_step

SMALL = ("beit_base_patch16_224", "eva02_tiny_patch14_224", "test_vit_relpos", "pit_b_224", "vit_base_patch16_gap_224")


@pytest.fixture(autouse=True)
def _compiled_models_run_as_they_are():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("way", WAYS)
def test_random_surgery(way):
    """Whatever is done to a model before, it comes out right, or is refused as it was."""
    outcomes = [take_step(seed, Choices(SMALL, ways=(way,))) for seed in range(2)]
    assert not [o for o in outcomes if o.result == "violation"]
    assert [o for o in outcomes if o.result == "right"]


@pytest.mark.parametrize("surgery", ["nothing at all", "adapter", "hooked"])
def test_a_wrong_value_is_seen(surgery, monkeypatch):
    """One entry of each resampled tensor that is not what it should be is a violation."""
    values = timm_resize.core.values.like_parameter

    def off(new: Tensor, param: Tensor) -> Tensor:
        new = values(new, param).clone()
        new.view(-1)[-1] += 1
        return new

    monkeypatch.setattr(timm_resize.core.values, "like_parameter", off)
    choices = Choices(("beit_base_patch16_224",), (surgery,), ("resize_",))
    assert take_step(1, choices).result == "violation"


def test_a_change_after_a_refusal_is_seen():
    """An error that comes after one entry was written is a violation; one that comes before is itself."""
    model = nn.Linear(2, 2)

    def refused(by: float) -> None:
        with unchanged(model):
            model.bias.data[0] += by
            raise timm_resize.ResizeError("too late")

    with pytest.raises(timm_resize.ResizeError):
        refused(0.0)
    with pytest.raises(WrongError, match="changed: .*bias"):
        refused(1.0)
