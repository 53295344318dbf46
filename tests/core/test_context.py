"""What a handler's mistakes are answered with: class, argument and what to write, and a model that is as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import timm_resize
from timm_resize import Context, Rebuild, Reinitialise, UnsupportedModelError
from timm_resize.core.request import make_request

REFERENCE = Path(__file__).parents[2] / "docs" / "extend" / "reference.md"


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 2))  # a 2x2 grid
        self.register_buffer("index", torch.zeros(4, 4))
        self.register_buffer("mask", None)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.img_size = Part(), 4


def ones(*shape, device, dtype):
    return torch.ones(shape, device=device, dtype=dtype)


def plan_part(part, ctx, *, grid, shift=0):
    yield from ctx.attribute(part, grid=grid)


@pytest.fixture
def resize():
    """A function that resizes a Net whose handler does what it is given; the net stays as it was after an error."""
    with timm_resize.registry.override():
        timm_resize.register(Part)(plan_part)

        def run(plan):
            with timm_resize.registry.override():
                timm_resize.register(Net)(plan)
                net = Net()
                before = dict(vars(net.part)), {k: v.clone() for k, v in net.state_dict().items()}
                try:
                    timm_resize.resize_(net, 6)
                except timm_resize.ResizeError:
                    assert vars(net.part) == before[0]
                    assert all(torch.equal(v, before[1][k]) for k, v in net.state_dict().items())
                    raise
                return net

        yield run


def gives(call):
    """A handler that yields from one call, after skipping the part's own handler."""

    def plan(net, ctx):
        ctx.skip(net.part)
        yield from call(net, ctx)

    return plan


def three_by_three(net, ctx):
    yield from ctx.parameter(net.part, "table", ctx.pos_embed((2, 2), (3, 3), dim=0))
    yield from ctx.buffer(net.part, "index", (9, 9), Rebuild(ones, (9, 9)))
    yield from ctx.buffer(net.part, "mask", (1, 9), Rebuild(ones, (1, 9), like="table"))


def test_a_right_handler_changes_what_it_says(resize):
    """A map for the parameter, a rule for each buffer, also for one that was None."""
    part = resize(gives(three_by_three)).part
    assert part.table.shape == (9, 2)
    assert torch.equal(part.index, torch.ones(9, 9))
    assert torch.equal(part.mask, torch.ones(1, 9))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda n, c: c.visit(n.part, window=3),
            "ctx.visit of a Part (part): its handler plan_part does not take window=. "
            "Write ctx.visit(module, grid=..., shift=...).",
        ),
        (
            lambda n, c: c.visit(n.part, shift=3),
            "ctx.visit of a Part (part): its handler plan_part needs grid=, which was not given. "
            "Write ctx.visit(module, grid=..., shift=...).",
        ),
        (
            lambda n, c: c.parameter(n.part, "tabel", c.pos_embed((2, 2), (3, 3))),
            "no parameter 'tabel'. Use one of table.",
        ),
        (lambda n, c: c.parameter(n.part, "table", ones), "is not a map. Give a map of ctx"),
        (lambda n, c: c.buffer(n.part, "indx", (9, 9)), "it has no buffer 'indx'. Use one of index, mask."),
        (
            lambda n, c: c.buffer(n.part, "index", (9, 9)),
            "how=None is no rule for 'index' of shape (9, 9). Give Rebuild",
        ),
        (lambda n, c: c.buffer(n.part, "index", (9, 9), Reinitialise()), "it has no init_non_persistent_buffers"),
        (
            lambda n, c: c.buffer(n.part, "mask", (1, 9), Rebuild(ones, (1, 9))),
            "'mask' is None, without device and dtype",
        ),
        (
            lambda n, c: c.attribute(Part(), a=1),
            "ctx was given a Part that is not in the Net. Give modules of ctx.root",
        ),
        (lambda n, c: [c.attribute(n.part, a=1)], "ctx.visit of a Net (the model): plan yields <generator object"),
    ],
)
def test_mistakes(resize, call, words):
    """Each is a ResizeError that starts with the model and says where and what to write."""
    with pytest.raises(timm_resize.ResizeError, match=f"Net: .*{re.escape(words)}"):
        resize(gives(call))


def test_shapes_that_do_not_fit(resize):
    """A map for another grid than the parameter's, and a rule that makes another shape than was planned."""
    with pytest.raises(UnsupportedModelError, match=r"part\.table does not have .* holds 4 grid entries, not 25"):
        resize(gives(lambda n, c: c.parameter(n.part, "table", c.pos_embed((5, 5), (3, 3), dim=0))))
    words = r"Net: part\.index of Part is planned as \(9, 9\), and its Rebuild\(ones, \(9, 8\)\) makes it \(9, 8\)"
    with pytest.raises(UnsupportedModelError, match=words):
        resize(gives(lambda n, c: c.buffer(n.part, "index", (9, 9), Rebuild(ones, (9, 8)))))


def test_the_reference_has_a_row_for_everything_of_ctx():
    """Each public method and attribute stands in the first column of a table, and nothing else does."""
    ctx = Context(Net(), make_request("Net", 6), (4, 4), (6, 6))
    rows = [line.split("|")[1] for line in REFERENCE.read_text().splitlines() if line.startswith("| `ctx.")]
    assert {name for row in rows for name in re.findall(r"`ctx\.(\w+)", row)} == {
        name for name in dir(ctx) if not name.startswith("_")
    }
