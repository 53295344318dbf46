"""Writes that all happen or none do: every write to a model, an optimizer or an average goes through here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_resize.core.locks import Lock
from timm_resize.core.plan import MISSING

Writes = list[Callable[["Transaction"], None]]
"""Each performs one write through the transaction that it is given."""

_turns = Lock()


@contextmanager
def resizing() -> Iterator[None]:
    """Take turns with the other threads that resize a model in place, from the plan to the last write; no autograd."""
    with torch.inference_mode(False), torch.no_grad(), _turns:
        yield


def write_all(writes: Writes) -> Callable[[], None]:
    """Perform all writes or, on any error, none; returns what undoes them."""
    transaction = Transaction()
    try:
        for write in writes:
            write(transaction)
    except BaseException:
        transaction.undo()
        raise
    return transaction.undo


class Stateful(Protocol):
    """Anything with a state dict: a gradient scaler, a scheduler."""

    def state_dict(self) -> dict[str, object]:
        """Return what it keeps."""

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take it over."""


class Transaction:
    """Writes, each with its undo logged first."""

    def __init__(self) -> None:
        """Start with an empty log."""
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Take every write back, the last first."""
        while self._undo:
            self._undo.pop()()

    def parameter(self, param: nn.Parameter, new: Tensor) -> None:
        """Give `param` new data, possibly of another shape; a pending gradient of another shape is dropped."""
        old, grad, inferred = param.data, param.grad, param.is_inference()

        def put(data: Tensor) -> None:
            param.grad = None
            with torch.inference_mode(inferred):  # torch would take a tensor half of that mode for none
                _reset_accumulator(param)
                param.data = data.clone() if inferred else data

        def undo() -> None:
            put(old)
            param.grad = grad

        self._log(lambda: put(new), undo)

    def gradient(self, param: nn.Parameter, new: Tensor | None) -> None:
        """Set a pending gradient."""
        old = param.grad
        self._log(lambda: setattr(param, "grad", new), lambda: setattr(param, "grad", old))

    def buffer(self, module: nn.Module, name: str, new: Tensor | None) -> None:
        """Replace a buffer; one that was not there becomes non-persistent."""
        buffers, transient = module._buffers, module._non_persistent_buffers_set
        known, old, was_transient = name in buffers, buffers.get(name), name in transient

        def do() -> None:
            buffers[name] = new
            if not known:
                transient.add(name)

        def undo() -> None:
            if known:
                buffers[name] = old
            else:
                buffers.pop(name, None)
            if not was_transient:
                transient.discard(name)

        self._log(do, undo)

    def attribute(self, owner: object, name: str, new: object) -> None:
        """Set an attribute; `MISSING` deletes it."""
        old = type(owner) if name == "__class__" else owner.__dict__.get(name, MISSING)
        self._log(lambda: set_attribute(owner, name, new), lambda: set_attribute(owner, name, old))

    def item(self, mapping: MutableMapping[Any, Any], key: Hashable, new: object) -> None:
        """Set an entry of a dict, e.g. of an optimizer's state; `MISSING` deletes it."""
        old = mapping.get(key, MISSING)
        self._log(lambda: _set_item(mapping, key, new), lambda: _set_item(mapping, key, old))

    def load(self, module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        """Load a state dict into the module's own memory. What the tensors held is kept meanwhile."""
        own = module.state_dict()
        before = {key: own[key].clone() for key in state_dict if key in own}
        self._log(lambda: _load(module, state_dict), lambda: _load(module, before))

    def load_optimizer(self, optimizer: Optimizer, state_dict: dict[str, object]) -> None:
        """Load an optimizer's state dict, which makes new state and groups of it."""
        before = {key: optimizer.__dict__[key] for key in ("state", "param_groups")}
        self._log(lambda: optimizer.load_state_dict(state_dict), lambda: optimizer.__dict__.update(before))

    def load_other(self, thing: Stateful, state_dict: dict[str, object]) -> None:
        """Load the state dict of anything that has one: a gradient scaler, a scheduler."""
        before = copy.deepcopy(thing.state_dict())
        self._log(lambda: thing.load_state_dict(state_dict), lambda: thing.load_state_dict(before))

    def _log(self, do: Callable[[], None], undo: Callable[[], None]) -> None:
        self._undo.append(undo)  # before: a write that breaks half-way is undone too
        _write(do)


def _write(do: Callable[[], None]) -> None:
    """Perform one write. Every write of this package passes here."""
    do()


def _load(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    module.load_state_dict(state_dict, strict=False)


def _set_item(mapping: MutableMapping[Any, Any], key: Hashable, value: object) -> None:
    if value is MISSING:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _reset_accumulator(param: nn.Parameter) -> None:
    """Make autograd forget the parameter's old shape, which a graph that is still alive keeps.

    Assigning data of another dtype does it; of another shape alone does not (torch/csrc/autograd/variable.cpp).
    """
    other = torch.float64 if param.dtype != torch.float64 else torch.float32
    param.data = torch.empty(0, dtype=other, device=param.device)


def set_attribute(owner: object, name: str, value: object) -> None:
    """Set an attribute; `MISSING` deletes it."""
    if value is MISSING:
        owner.__dict__.pop(name, None)
    else:
        setattr(owner, name, value)
