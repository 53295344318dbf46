"""Writes that all happen or none do: every write to a model, an optimizer or an average goes through here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from timm_resize.core.plan import MISSING

Writes = list[Callable[["Transaction"], None]]


class Transaction:
    """Writes that all happen or all do not: leaving by an exception undoes them in reverse order."""

    def __init__(self) -> None:
        """Start with an empty log."""
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for undo in reversed(self._undo):
                undo()
        self._undo.clear()

    def parameter(self, param: nn.Parameter, new: Tensor) -> None:
        """Give `param` new data, possibly of another shape; a pending gradient of another shape is dropped."""
        old, grad = param.data, param.grad

        def do() -> None:
            param.grad = None
            _reset_accumulator(param)
            param.data = new

        def undo() -> None:
            param.grad = None
            _reset_accumulator(param)
            param.data = old
            param.grad = grad

        self._log(do, undo)

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

    def attribute(self, owner: Any, name: str, new: Any) -> None:
        """Set an attribute; `MISSING` deletes it."""
        old = type(owner) if name == "__class__" else owner.__dict__.get(name, MISSING)
        self._log(lambda: set_attribute(owner, name, new), lambda: set_attribute(owner, name, old))

    def item(self, mapping: Any, key: Any, new: Any) -> None:
        """Set an entry of a dict, e.g. of an optimizer's state; `MISSING` deletes it."""
        old = mapping.get(key, MISSING)
        self._log(lambda: _set_item(mapping, key, new), lambda: _set_item(mapping, key, old))

    def _log(self, do: Callable[[], None], undo: Callable[[], None]) -> None:
        self._undo.append(undo)  # before: a write that breaks half-way is undone too
        _write(do)


def _write(do: Callable[[], None]) -> None:
    """Perform one write. Every write of this package passes here."""
    do()


def _set_item(mapping: Any, key: Any, value: Any) -> None:
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


writing = threading.RLock()


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Set an attribute; `MISSING` deletes it."""
    if value is MISSING:
        owner.__dict__.pop(name, None)
    else:
        setattr(owner, name, value)
