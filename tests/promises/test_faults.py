"""Memory that runs out at any tensor operation of a resize: everything is as before, and the next resize works."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import timm_resize
from tests.helpers.examples import EXAMPLES, example
from tests.helpers.oracle import assert_same_structure, tensors
from timm_resize.core.find import current_size


class OutOfMemory(TorchDispatchMode):
    """Counts tensor operations, and refuses the one numbered `at` as a full memory does."""

    def __init__(self, at=0):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise torch.cuda.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


def prepared(name):
    """A model, an optimizer with state and an EMA copy."""
    model = example(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for param in model.parameters():
        optimizer.state[param] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.randn_like(param),
            "exp_avg_sq": torch.rand_like(param),
        }
    return model, optimizer, copy.deepcopy(model)


def faults_injected(name, faults):
    """Inject faults at the operations that `faults(count)` names, check after each; returns how many there were."""
    model, optimizer, ema = prepared(name)
    size = timm_resize.nearest_sizes(model, tuple(side + 64 for side in current_size(model)))[0]
    for _ in range(2):  # the first fills caches of maps, which the second finds
        duplicate = copy.deepcopy(model)
        with OutOfMemory() as counter:
            timm_resize.resize_(duplicate, size)
    before = {k: (v, v.clone()) for part in (model, ema) for k, v in tensors(part).items()}
    whole = [copy.deepcopy(part) for part in (model, ema)]
    held = [tensors(copy_) for copy_ in whole]
    state = copy.deepcopy(optimizer.state_dict())
    done = 0
    for at in faults(counter.count):
        fault = OutOfMemory(at)
        try:
            with fault:
                timm_resize.resize_(model, size, optimizer=optimizer, ema=ema)
        except torch.cuda.OutOfMemoryError:
            done += 1
        else:  # without the operations that the duplicate's resize took for itself
            assert fault.count < at
            break
        for part, copy_, want in zip((model, ema), whole, held, strict=True):
            assert_same_structure(part, copy_)
            assert all(torch.equal(v, want[k]) for k, v in tensors(part).items()), at
        assert all(v is before[k][0] for k, v in tensors(ema).items()), at
        now = optimizer.state_dict()["state"]
        assert all(torch.equal(now[i][k], v) for i, entry in state["state"].items() for k, v in entry.items()), at
    timm_resize.resize_(model, size, optimizer=optimizer, ema=ema)
    assert current_size(model) == current_size(ema) == size
    return done


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", sorted(EXAMPLES)[::12])
def test_some_operations(name, record_property):
    """The first and two more of the operations that the model itself takes."""
    record_property("faults", faults_injected(name, lambda n: sorted({at for at in (1, n // 2, n) if 0 < at <= n})))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_operation(name, record_property):
    """Each operation that the model itself takes."""
    record_property("faults", faults_injected(name, lambda n: range(1, n + 1)))
