"""Typical wrong calls are errors of a type checker, and at run time; right ones are neither.

mypy checks this file with the package: each `type: ignore` stands for an error that it must find (an unused one is an
error itself), and a call without one is a call that it must accept.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import timm_resize
from timm_resize import MultiSize, ResizeError, create_model, nearest_sizes, plan_resize, resize_, resize_state_dict

NAME = "vit_tiny_patch16_224"


@pytest.fixture
def model() -> nn.Module:
    """The smallest ViT, without values."""
    return create_model(NAME, depth=1, device="meta")


def test_a_size_that_is_none(model: nn.Module) -> None:
    """Text and fractions are no sizes."""
    with pytest.raises(ResizeError):
        plan_resize(model, "384")  # type: ignore[arg-type]
    with pytest.raises(ResizeError):
        plan_resize(model, 384.0)  # type: ignore[arg-type]
    with pytest.raises(ResizeError):
        create_model(NAME, img_size="384")  # type: ignore[arg-type]
    with pytest.raises(ResizeError):
        create_model(NAME, img_size=(384, 1.5))  # type: ignore[arg-type]


def test_a_keyword_that_is_none(model: nn.Module) -> None:
    """A slip in an option's name or value."""
    with pytest.raises(ResizeError):
        plan_resize(model, 384, window_polcy="keep")  # type: ignore[call-arg]
    with pytest.raises(ResizeError):
        resize_(model, 384, window_policy="scal")  # type: ignore[arg-type]
    with pytest.raises(ResizeError):
        create_model(NAME, img_size=384, preset="dino")  # type: ignore[arg-type]
    with pytest.raises(ResizeError):
        MultiSize(model, interpolation="cubic")  # type: ignore[arg-type]


def test_arguments_in_each_other_s_place(model: nn.Module, tmp_path: Path) -> None:
    """The model stands first, but where a state dict does."""
    with pytest.raises((ResizeError, TypeError, AttributeError)):
        resize_(model.parameters(), 384)  # type: ignore[arg-type]
    with pytest.raises((ResizeError, TypeError, AttributeError)):
        resize_state_dict(model, model.state_dict())  # type: ignore[arg-type]
    with pytest.raises((ResizeError, TypeError, AttributeError)):
        timm_resize.save_pretrained(tmp_path, model)  # type: ignore[arg-type]


def test_a_name_that_is_none(model: nn.Module) -> None:
    """Of the package, and of a plan."""
    with pytest.raises(AttributeError, match="resise_"):
        timm_resize.resise_(model, 384)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="new_sise"):
        print(plan_resize(model, 384).new_sise)  # type: ignore[attr-defined]


def test_right_calls(model: nn.Module) -> None:
    """Sizes as ints, tuples, lists and shapes of tensors; options as they are documented; results of their types."""
    for size in (384, (320, 448), [320, 448], torch.empty(1, 3, 96, 160, device="meta").shape[-2:]):
        plan = plan_resize(model, size)
        height, width = plan.new_size
        assert height % 16 == width % 16 == 0
    assert plan_resize(model, 384, patch_size=8, interpolation="bilinear", antialias=False, window_size=None)
    assert [h + w for h, w in nearest_sizes(model, 250)] == [512, 480]
    built = create_model(NAME, img_size=[96, 160], patch_size=32, preset="deit", depth=1, num_classes=0, device="meta")
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
    assert resize_(built, (128, 160), optimizer=[optimizer], grad="clear").summary(attributes=True)
    state: dict[str, torch.Tensor] = resize_state_dict(built.state_dict(), built, source=(128, 160))
    assert state.keys() == built.state_dict().keys()
