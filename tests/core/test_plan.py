"""Plans as values: what makes one stale, and how two attribute values compare."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import timm
import torch
from torch import nn

import timm_resize
from tests.helpers.oracle import stock
from timm_resize.core.plan import CACHE, MISSING, Change, ResizePlan, same_value


@pytest.fixture
def model():
    """A layer whose size-dependent state is plain attributes, with a hand-written handler: a tensor, a dict of one."""

    class Coordinates(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = torch.arange(4)
            self.cache = {"rows": torch.arange(4), "names": ["a", "b"]}
            self._traits = {"img_size": (4, 4)}

    @timm_resize.register(Coordinates)
    def plan(module, ctx):
        rows = torch.arange(ctx.new_size[0])
        yield from ctx.attribute(module, rows=rows, cache={"rows": rows.clone(), "names": ["a", "b"]})

    return Coordinates()


def test_attributes_that_are_tensors(model):
    """They are set, and a plan for them applies as long as they are what it was made for."""
    plan = timm_resize.plan_resize(model, 6)
    assert [c.name for c in plan if not c.name.startswith("_")] == ["rows", "cache"]
    timm_resize.resize_(model, plan)
    assert model.rows.tolist() == model.cache["rows"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("what", ["value", "length", "dtype", "held", "gone"])
def test_a_changed_tensor_attribute_makes_a_plan_stale(model, what):
    """Another value, length or type, in a container too, is a StalePlanError that names the attribute."""
    plan = timm_resize.plan_resize(model, 6)
    if what == "value":
        model.rows = torch.tensor([0, 1, 2, 9])
    elif what == "length":
        model.rows = torch.arange(5)
    elif what == "dtype":
        model.rows = torch.arange(4.0)
    elif what == "held":
        model.cache = {"rows": torch.tensor([0, 1, 2, 9]), "names": ["a", "b"]}
    else:
        del model.rows
    before = dict(model.__dict__)
    with pytest.raises(timm_resize.StalePlanError, match=r"^Coordinates: (rows|cache) is .*, the plan was made for"):
        timm_resize.resize_(model, plan)
    assert all(model.__dict__[name] is value for name, value in before.items())


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (7, 7, True),
        (7, 7.0, False),
        (1, True, False),
        ((7, 7), [7, 7], False),
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.ones(3), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), torch.ones(2, device="meta"), False),
        (torch.ones(2, device="meta"), torch.ones(2, device="meta"), True),
        (torch.ones(2), [1.0, 1.0], False),
        ([torch.ones(2), 1], [torch.ones(2), 1], True),
        ([torch.ones(2)], [torch.zeros(2)], False),
        ({"a": (torch.ones(2),)}, {"a": (torch.ones(2),)}, True),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, False),
        (MISSING, MISSING, True),
        (MISSING, None, False),
    ],
)
def test_same_value(a, b, same):
    """Equal, of one type, tensors of one dtype and device; in containers too."""
    assert same_value(a, b) is same


@pytest.mark.parametrize("mark", [MISSING, CACHE])
def test_marks_are_one_object(mark):
    """A copied or pickled plan has the same marks."""
    assert copy.deepcopy(mark) is pickle.loads(pickle.dumps(mark)) is mark


def test_a_plan_of_another_architecture_is_stale():
    """Tensors that the model has not are said, by the plan's own error."""
    plan = timm_resize.plan_resize(stock("vit_tiny_patch16_224", depth=1), 96)
    with pytest.raises(timm_resize.StalePlanError):
        timm_resize.resize_(stock("levit_128s"), plan)


def test_no_empty_record_is_made():
    """A model built by its class has no record of a factory's arguments; a resize that has none to add leaves it so."""
    model = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8))
    timm_resize.resize_(model, 96)
    assert "_model_args" not in vars(model)


def test_a_plan_prints_as_its_table():
    """The six blocks of a Swin's third stage are one row, the masks of every second block of all stages another."""
    plan = timm_resize.plan_resize(stock("swin_tiny_patch4_window7_224", depths=(1, 1, 6, 1), embed_dim=24), 448)
    assert repr(plan) == str(plan) == plan.summary()
    rows = [line.split()[:2] for line in repr(plan).splitlines()]
    assert ["layers.*.blocks.*.attn.relative_position_bias_table", "(x6)"] in rows
    assert ["layers.*.blocks.*.attn_mask", "(x3)"] in rows
    assert len(rows) == 7


def test_a_plan_as_json():
    """Sizes and shapes are lists, what is not there is null, attributes are values or text, and JSON holds it all."""
    plan = ResizePlan(
        "Net",
        None,
        (4, 6),
        (
            Change("", "pos", "parameter", (1, 9), (1, 24), timm_resize.Reinitialise()),
            Change("a.0", "mask", "buffer", (3, 3), None),
            Change("a", "grid", "attribute", MISSING, {"x": (4, torch.ones(2, 3)), 1: nn.ReLU()}),
        ),
        ("a note",),
        ("a warning",),
    )
    got = plan.to_dict()
    assert json.loads(json.dumps(got)) == got
    assert got == {
        "schema": 1,
        "model": "Net",
        "old_size": None,
        "new_size": [4, 6],
        "changes": [
            {"name": "pos", "kind": "parameter", "action": "rebuilt", "old": [1, 9], "new": [1, 24]},
            {"name": "a.0.mask", "kind": "buffer", "action": "dropped", "old": [3, 3], "new": None},
            {
                "name": "a.grid",
                "kind": "attribute",
                "action": "set",
                "old": None,
                "new": {"x": [4, "Tensor 2x3"], "1": "ReLU()"},
            },
        ],
        "notes": ["a note"],
        "warnings": ["a warning"],
    }


def test_a_plan_in_a_notebook():
    """A table row for each row of the text, its words escaped, the notes below; a plan of nothing says so."""
    change = Change("", "<b>", "parameter", (1, 9), (1, 24), timm_resize.Reinitialise())
    html = ResizePlan("Net", (3, 3), (4, 6), (change,), ("a < b",))._repr_html_()
    assert html.startswith("<b>Net: 3x3 -&gt; 4x6</b><table><tr><th>tensor</th>")
    cells = "<td>&lt;b&gt;</td><td>parameter</td><td>1x9 -&gt; 1x24</td><td>rebuilt</td>"
    assert html.endswith(f"<tr>{cells}</tr></table><p>note: a &lt; b</p>")
    assert ResizePlan("Net", (3, 3), (3, 3))._repr_html_().endswith("<table></table><p>nothing to change</p>")
