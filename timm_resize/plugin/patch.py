"""Exchange the code of a function of timm, which stays the same object under whatever name it was imported."""

from __future__ import annotations

import types
from typing import Any

_stock: dict[Any, types.CodeType] = {}


def original(function: Any) -> Any:
    """Return a function that runs what `function` runs now, whatever is grafted onto that later; None for None."""
    if function is None:  # a timm without it, which `install` refuses
        return None
    copy_ = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copy_.__kwdefaults__ = function.__kwdefaults__
    return copy_


def graft(function: Any, scion: Any) -> None:
    """Let `function` run the code of `scion`, which has its parameters and imports what it uses itself."""
    _stock.setdefault(function, function.__code__)
    function.__code__ = scion.__code__


def ungraft(function: Any) -> None:
    """Give `function` its own code back."""
    function.__code__ = _stock.pop(function, function.__code__)
