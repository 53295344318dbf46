"""What a handler gets back from another's, and how it learns sizes by running a part of the model without values."""

from __future__ import annotations

import pytest
import torch
from timm.layers import RelPosBias
from torch import nn

import timm_resize
from tests.helpers.oracle import stock
from timm_resize.core.context import Context, Grids, Invalid
from timm_resize.core.request import Request


class Raises(nn.Module):
    """A part whose forward fails as told."""

    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


def context(root: nn.Module, size: tuple[int, int]) -> Context:
    return Context(root, Request(), None, size)


def test_a_handler_that_does_not_return_what_its_model_needs_is_named():
    """The error says which class, where, what came back and what to write."""
    root = nn.ModuleDict({"bias": RelPosBias((4, 4), 2)})
    with pytest.raises(
        timm_resize.UnsupportedModelError,
        match=r"handler of RelPosBias \(bias\) returns None, and its model needs Grids\. End it with return Grids\(",
    ):
        list(context(root, (6, 5)).visit(root["bias"], Grids, window=(6, 5)))


def test_output_size_is_the_last_map_of_parts_in_a_row():
    """A 3x3 convolution of stride 2 makes 4x5 cells of 9x12 pixels, a pool of 2 then 2x2; the weights stay unread."""
    root = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AvgPool2d(2))
    root[0].weight.data.fill_(float("nan"))
    assert context(root, (9, 12)).output_size(root[0], channels=3) == (4, 5)
    assert context(root, (9, 12)).output_size(*root, channels=3) == (2, 2)
    assert context(root.half(), (9, 12)).output_size(*root, channels=3) == (2, 2)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("out"), MemoryError("out"), TypeError("a bug")])
def test_only_a_size_is_called_invalid(error):
    """Out of memory and mistakes of ours pass through a run for shapes as they are; a layer's refusal does not."""
    root = nn.Sequential(Raises(error))
    with pytest.raises(type(error)):
        context(root, (9, 9)).output_size(root[0], channels=3)
    root = nn.Sequential(Raises(ValueError("odd")))
    with pytest.raises(Invalid, match="does not pass 0"):
        context(root, (9, 9)).output_size(root[0], channels=3)


def test_a_small_size_that_ran_out_of_memory_is_not_an_invalid_one():
    """Below 64 px forward decides, by what layers raise for a map; nothing else counts as an answer."""
    model = stock("test_convnext", device="meta")
    for error in (torch.cuda.OutOfMemoryError("out"), MemoryError("out")):
        model.stem = Raises(error)
        with pytest.raises(type(error)):
            timm_resize.plan_resize(model, 48)
    model.stem = Raises(TypeError("a bug"))
    with pytest.raises(timm_resize.UnsupportedModelError, match=r"\(TypeError: a bug\)"):
        timm_resize.plan_resize(model, 48)
    model.stem = Raises(ValueError("odd"))
    with pytest.raises(timm_resize.InvalidSizeError, match=r"does not come out even.* Use 64\.$"):
        timm_resize.plan_resize(model, 48)


def test_small_sizes_of_a_model_in_half_precision():
    """The try runs in the model's own dtype: a size that forward takes is planned, with nothing to change."""
    seen = []
    model = stock("test_convnext", device="meta").half()
    model.stem.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, args[0].shape[2:])))
    plan = timm_resize.plan_resize(model, 48)
    assert set(seen) == {(torch.float16, (48, 48))}
    assert plan.new_size == (48, 48)
    assert plan.tensors == ()
