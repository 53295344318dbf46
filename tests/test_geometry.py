"""Parsing sizes: what counts as one, and what each refusal says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from timm_resize.errors import InvalidSizeError, ResizeError
from timm_resize.geometry import ceil_div, floor_div, parse_size, stage_sizes, text

ADVICE = "Use img_size=224 for a square, or img_size=(192, 256) for height and width."


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (224, (224, 224)),
        (1, (1, 1)),
        (np.int64(160), (160, 160)),
        (np.uint8(160), (160, 160)),
        (np.array(160), (160, 160)),
        (torch.tensor(160), (160, 160)),
        ((192, 256), (192, 256)),
        ([192, 256], (192, 256)),
        (torch.Size([192, 256]), (192, 256)),
        (torch.empty(3, 192, 256).shape[-2:], (192, 256)),
        (np.array([192, 256]), (192, 256)),
        (torch.tensor([192, 256]), (192, 256)),
        ((np.int32(192), torch.tensor(256)), (192, 256)),
        (range(8, 10), (8, 9)),
    ],
    ids=repr,
)
def test_sizes_are_read(value, want):
    """Ints of Python, NumPy and PyTorch, and any pair of them; always plain (h, w)."""
    got = parse_size(value)
    assert got == want
    assert type(got) is tuple
    assert [type(side) for side in got] == [int, int]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (224.0, "float"),
        (float("nan"), "float"),
        (float("inf"), "float"),
        (np.float32(224), "float32"),
        (torch.tensor(224.0), "Tensor"),
        (True, "bool"),
        (np.True_, type(np.True_).__name__),
        (torch.tensor(True), "Tensor"),
        ("224", "str"),
        (b"22", "bytes"),
        (None, "NoneType"),
        (224 + 0j, "complex"),
        ({"h": 224, "w": 224}, "dict"),
        ({224, 192}, "set"),
        (object, "type"),
        ((224, 224.0), "float"),
        ((True, 224), "bool"),
        ((224, "224"), "str"),
        ((None, 224), "NoneType"),
        ((float("nan"), 224), "float"),
        (((224, 224), (224, 224)), "tuple"),
        ([[224], 224], "list"),
        (np.array([192.0, 256.0]), "float64"),
        (np.array([[192, 256]]), "ndarray"),
        (torch.tensor([192.0, 256.0]), "Tensor"),
        (torch.tensor([True, True]), "Tensor"),
    ],
    ids=repr,
)
def test_what_is_not_a_size(value, kind):
    """Floats (NaN too), bools of any library, strings, None, mappings, nested pairs: the type is named."""
    with pytest.raises(InvalidSizeError) as error:
        parse_size(value)
    message = str(error.value)
    assert message.startswith("timm_resize: img_size=")
    assert message.endswith(f" is a {kind}, not whole pixels. {ADVICE}")


@pytest.mark.parametrize("value", [0, -1, (0, 224), (224, 0), (-224, 224), np.int64(-8), torch.tensor(0)], ids=repr)
def test_sides_are_positive(value):
    """Zero and negative sides."""
    with pytest.raises(InvalidSizeError) as error:
        parse_size(value)
    assert str(error.value) == f"timm_resize: img_size={value!r} has a side below 1. {ADVICE}"


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ((), 0),
        ((224,), 1),
        ([224], 1),
        ((3, 224, 224), 3),
        (torch.Size([3, 224, 224]), 3),
        (np.array([224]), 1),
        (torch.tensor([1, 3, 8, 8]), 4),
    ],
    ids=repr,
)
def test_a_pair_has_two(value, count):
    """One number in a sequence or three, such as (channels, height, width)."""
    with pytest.raises(InvalidSizeError) as error:
        parse_size(value)
    message = str(error.value)
    assert message.startswith("timm_resize: img_size=")
    assert message.endswith(f" has {count} numbers, not (height, width). {ADVICE}")


def test_errors_name_the_argument_and_the_model():
    """The caller's names stand in the message, which is a ValueError without a chained cause."""
    with pytest.raises(ValueError, match=r"^Swin: window_size='7' is a str, .* Use window_size=224 for") as error:
        parse_size("7", "window_size", "Swin")
    assert isinstance(error.value, ResizeError)
    assert error.value.__context__ is None
    assert (error.value.model, error.value.argument, error.value.value) == ("Swin", "window_size", "7")


@pytest.mark.parametrize(
    ("value", "stages", "want"),
    [
        (7, 3, ((7, 7),) * 3),
        (np.int64(7), 2, ((7, 7),) * 2),
        (torch.tensor(7), 2, ((7, 7),) * 2),
        ((8, 4), 4, ((8, 4),) * 4),
        ([8, 4], 2, ((8, 4), (8, 4))),
        (torch.Size([8, 4]), 3, ((8, 4),) * 3),
        ([7, 7, 14], 3, ((7, 7), (7, 7), (14, 14))),
        ((7, np.int64(7), torch.tensor(14), 7), 4, ((7, 7), (7, 7), (14, 14), (7, 7))),
        ([(8, 4), 7], 2, ((8, 4), (7, 7))),
        ([(8, 4), [4, 8], 7], 3, ((8, 4), (4, 8), (7, 7))),
        ([7], 1, ((7, 7),)),
        ([(8, 4)], 1, ((8, 4),)),
    ],
    ids=repr,
)
def test_stage_sizes(value, stages, want):
    """One int, one pair, or one of either per stage; two ints are a pair, as stock timm reads them."""
    got = stage_sizes(value, stages)
    assert got == want
    assert all(type(side) is int for size in got for side in size)


@pytest.mark.parametrize(
    ("value", "stages"), [([7, 7, 14], 4), ([7, 7, 7, 7, 7], 4), ([(8, 4), 7], 3), ([], 2), ([7], 2)]
)
def test_stage_sizes_count(value, stages):
    """One entry per stage, no more and no fewer."""
    with pytest.raises(InvalidSizeError) as error:
        stage_sizes(value, stages, owner="Swin")
    assert str(error.value) == (
        f"Swin: window_size={value!r} has {len(value)} entries for {stages} stages. "
        f"Use one int, one (h, w), or {stages} of them."
    )


@pytest.mark.parametrize(
    ("value", "stages", "complaint"),
    [
        (7.0, 4, "window_size=7.0 is a float"),
        (True, 4, "window_size=True is a bool"),
        ("7777", 4, "window_size='7777' is a str"),
        (None, 4, "window_size=None is a NoneType"),
        (0, 4, "window_size=0 has a side below 1"),
        ((7, -7), 4, "window_size=(7, -7) has a side below 1"),
        ([7, 7, 7.5], 3, "window_size=7.5 is a float"),
        ([7, 0, 7], 3, "window_size=0 has a side below 1"),
        ([7, None], 2, "window_size=None is a NoneType"),
        ([7, float("nan")], 2, "window_size=nan is a float"),
        ([True, True], 2, "window_size=True is a bool"),
        ([7, (7, 7, 7)], 2, "window_size=(7, 7, 7) has 3 numbers"),
        ([((7, 7), (7, 7)), 7], 2, "window_size=((7, 7), (7, 7)) is a tuple"),
    ],
    ids=repr,
)
def test_stage_sizes_refuse_what_is_no_size(value, stages, complaint):
    """The entry at fault is the one quoted."""
    with pytest.raises(InvalidSizeError) as error:
        stage_sizes(value, stages)
    assert str(error.value).startswith(f"timm_resize: {complaint}")


@pytest.mark.parametrize(
    ("size", "by", "floor", "ceil"),
    [
        ((224, 256), 16, (14, 16), (14, 16)),
        ((230, 224), 16, (14, 14), (15, 14)),
        ((1, 33), 32, (0, 1), (1, 2)),
        ((230, 230), (14, 16), (16, 14), (17, 15)),
        ((0, 5), 5, (0, 1), (0, 1)),
    ],
)
def test_division_rounds(size, by, floor, ceil):
    """Down as a convolution without padding, up as one with; per axis."""
    assert floor_div(size, by) == floor
    assert ceil_div(size, by) == ceil


def test_text():
    """Height first."""
    assert text((192, 256)) == "192x256"
