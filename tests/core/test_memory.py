"""What a plan takes is known from its shapes, at every size, window and patch, before anything is allocated."""

from __future__ import annotations

import math

import pytest
import torch

import timm_resize
from tests.helpers.examples import EXAMPLES
from tests.helpers.oracle import stock, tensors
from timm_resize.core import memory

GIGABYTE = 10**9


@pytest.fixture
def small_machine(monkeypatch):
    """One gigabyte is free, on any machine."""
    monkeypatch.setattr(memory, "_free", lambda device: GIGABYTE)


CASES = {
    "tokens by tokens": ("resmlp_12_224", {"img_size": 1440}),  # 12 tables of 8100², 4 bytes
    "a window": ("swin_tiny_patch4_window7_224", {"img_size": 512, "window_size": 128}),  # index of 16384², 8 bytes
    "a patch": ("vit_tiny_patch16_224", {"img_size": 2048, "patch_size": 1}),  # 2048² positions
    "masks": ("swin_tiny_patch4_window7_224", {"img_size": 2048, "window_size": 64}),  # 64 windows of 4096², 4 bytes
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_at_ordinary_sizes(case, small_machine):
    """A resize, several sizes and a build at no more than 2048 pixels; the model is untouched."""
    name, wanted = CASES[case]
    model = stock(name, **EXAMPLES.get(name, {}))
    before = {k: (v, v.clone()) for k, v in tensors(model).items()}
    options = {k: v for k, v in wanted.items() if k != "img_size"}
    for call in (
        lambda: timm_resize.resize_(model, **wanted),
        lambda: timm_resize.MultiSize(model, **options).at(wanted["img_size"]),
        lambda: timm_resize.create_model(name, **wanted),
    ):
        with pytest.raises(timm_resize.InvalidSizeError, match=r"GB for its tensors, 1\.0 GB are free on cpu\. Use a"):
            call()
    assert any(note.startswith("its new tensors take ") for note in timm_resize.plan_resize(model, **wanted).notes)
    for key, value in tensors(model).items():
        assert value is before[key][0]
        assert torch.equal(value, before[key][1])


@pytest.mark.parametrize(
    ("name", "size", "least"),
    [
        ("vit_tiny_patch16_224", 448, 4 * 192 * (2 * 785 + 197)),  # original, new, and what was written
        ("resmlp_12_224", 448, 12 * 4 * (2 * 784**2 + 196**2)),
        ("levit_128s", 448, 8 * (784**2 + 196 * 784 + 196**2 + 49 * 196 + 49**2)),  # indices of five grids, shared
    ],
)
def test_the_bytes_of_a_plan(name, size, least):
    """At least what is kept, by hand, and at most twice as much: the rest is what one tensor is computed through."""
    model = stock(name, **({"depth": 1} if name.startswith("vit") else {}))
    found = memory.needed(model, timm_resize.plan_resize(model, size))
    assert found.keys() == {torch.device("cpu")}
    assert least <= found[torch.device("cpu")] <= 2 * least + 5 * 8 * 10**5


def test_what_an_optimizer_keeps_counts(monkeypatch):
    """Moments take as much as the weights: where they do not fit, nothing is written."""
    model = stock("vit_tiny_patch16_224", depth=1)
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before, moments = model.pos_embed.detach().clone(), optimizer.state[model.pos_embed]["exp_avg"]
    asked = []

    def free(device):
        asked.append(device)
        return GIGABYTE if len(asked) == 1 else 2 * 4 * 192 * 785 - 1

    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "_free", free)
    with pytest.raises(timm_resize.InvalidSizeError, match="GB for its tensors"):
        timm_resize.resize_(model, 448, optimizer=optimizer)
    assert torch.equal(model.pos_embed, before)
    assert optimizer.state[model.pos_embed]["exp_avg"] is moments


def test_a_full_memory_is_no_refused_size(monkeypatch):
    """Where nothing tells what is free, torch's own error comes through: a table of 10**16 entries fits nowhere."""
    monkeypatch.setattr(memory, "_free", lambda device: None)
    with pytest.raises(RuntimeError, match="allocate") as caught:
        timm_resize.create_model("resmlp_12_224", img_size=160_000)
    assert not isinstance(caught.value, timm_resize.ResizeError)


def test_sizes_of_everyday_cost_no_second_build(monkeypatch):
    """Up to twice the native side nothing is built to learn what it takes."""
    built = []
    monkeypatch.setattr(
        "timm_resize.plugin.create_model._without_memory", lambda *a: built.append(a) or stock("resnet18")
    )
    timm_resize.create_model("vit_tiny_patch16_224", img_size=448, depth=1)
    assert not built
    timm_resize.create_model("vit_tiny_patch16_224", img_size=464, depth=1)
    assert len(built) == 1


def test_the_limit_of_a_container(tmp_path):
    """A control group's limit less what it uses, but for pages that are only cached; none where it has none."""
    for name, text in {
        "memory.max": "1000",
        "memory.current": "700",
        "memory.stat": "anon 1\ninactive_file 50",
    }.items():
        (tmp_path / name).write_text(text + "\n")
    assert memory._left_to_group(10_000, tmp_path) == 1000 - 700 + 50
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_to_group(10_000, tmp_path) == 10_000
    assert memory._left_to_group(10_000, tmp_path / "none") == 10_000


@pytest.mark.parametrize("name", ["mvitv2_tiny", "resmlp_12_224", "swin_tiny_patch4_window7_224"])
def test_an_absurd_plan_is_a_plan(name):
    """A million pixels a side: the plan is made on the meta device, and says what it would take."""
    with torch.device("meta"):
        model = timm_resize.create_model(name)
    plan = timm_resize.plan_resize(model, 10**6)
    assert math.prod(max((c.new for c in plan.tensors if c.new), key=math.prod)) > 10**7
    assert any(note.startswith("its new tensors take ") for note in plan.notes)
