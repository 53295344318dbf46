"""Attribute values of two builds of a model: whether they are alike, and whether one can be set on a third."""

from __future__ import annotations

import functools
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn

NUMBERS: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, slice, range)
FIXED = (*NUMBERS, type, torch.dtype, torch.device, torch.Size, BuiltinFunctionType, ModuleType)
"""Types whose values say all that they are when printed or compared."""

Pairs = set[tuple[int, int]]


def alike(a: object, b: object, seen: Pairs | None = None) -> bool:
    """Whether two values, each of one build of a model, are the same but for being of two builds.

    Modules are alike that stand in the same place or are built alike; tensors with equal shapes and, where they have
    any, values; functions with the same code and with values alike in their closures.
    """
    seen = set() if seen is None else seen
    if a is b or (id(a), id(b)) in seen:
        return True
    seen.add((id(a), id(b)))
    if isinstance(a, type) or isinstance(b, type) or _kind(a) != _kind(b):
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = (a.shape, a.dtype) == (b.shape, b.dtype)
        return same and (a.is_meta or b.is_meta or torch.equal(a, b) or bool((a.isnan() & b.isnan()).all()))
    if isinstance(a, FIXED):
        return bool(a == b) or (a != a and b != b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(alike(a[key], b[key], seen) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y, seen) for x, y in zip(a, b, strict=True))
    if isinstance(a, (set, frozenset)):
        return a == b
    return all(alike(x, y, seen) for x, y in zip(_parts(a), _parts(b), strict=True))


def _kind(value: object) -> tuple[str, str]:
    return type(value).__module__, type(value).__qualname__


def _parts(value: object) -> list[object]:
    """Return what an object consists of."""
    if isinstance(value, FunctionType):
        return [value.__code__, value.__defaults__, value.__kwdefaults__, *map(_content, value.__closure__ or ())]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, nn.Module):
        return [value._parameters, value._buffers, value._modules, list(map(_kind, value._modules.values()))]
    slots = [getattr(value, name, None) for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    state = [getattr(value, "__dict__", None), slots]
    return state if any(state) else [repr(value) if type(value).__repr__ is not object.__repr__ else None]


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def obstacle(value: object, depth: int = 0) -> str:
    """Say what in a value belongs to its own build and cannot be set on another model, '' for nothing."""
    if isinstance(value, (Tensor, nn.Module)):
        return "a tensor" if isinstance(value, Tensor) else f"a module ({type(value).__name__})"
    if isinstance(value, FunctionType):
        return "a function made at the build" if value.__closure__ else ""
    if isinstance(value, FIXED) or depth > 20:
        return ""
    if isinstance(value, dict):
        inside = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = list(value)
    else:
        inside = [part for part in _parts(value) if part is not value]
    return next(filter(None, (obstacle(part, depth + 1) for part in inside)), "")
