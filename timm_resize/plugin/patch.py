"""Make a function of another package run ours, and put back what was there; or run a copy of it that calls ours.

`Exchange` swaps the code of a function. The function stays the same object, so every name, wrapper and partial that
holds it is reached without being looked for; whatever somebody else put there, before or after, is still called and
still there afterwards; and as it is one assignment, no thread sees half of it. Replacing names would do none of that.

`calling` touches nothing at all: it copies a function, and those of its package through which it gets to certain
others, so that the copy calls ours in their place. No other thread and no other library can notice.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[..., Any]

_replacements: dict[str, Function] = {}
"""What exchanged functions run, by full name. Entries stay: a thread may be on its way in when one is put back."""


def found(path: str) -> Any:
    """Return a package's own function by its full name, also where others have wrapped it; None where there is none."""
    module, _, name = path.rpartition(".")
    home = vars(sys.modules[module])
    package = module.partition(".")[0]
    for place in (home, *(vars(m) for n, m in list(sys.modules.items()) if n.partition(".")[0] == package and m)):
        function: Any = place.get(name)
        function = inspect.unwrap(function, stop=lambda f: getattr(f, "__code__", None) in _ours)
        if isinstance(function, types.FunctionType) and function.__globals__ is home:
            return function
    return None


def stock(path: str) -> Function:
    """Return what runs a package's own function as it is without us, by its full name."""
    return inspect.unwrap(found(path))


_ours: set[types.CodeType] = set()
"""Code that `Exchange` has put into functions."""


class Exchange:
    """One function that runs another while it is `put_in`.

    Args:
        function: A plain function, which stays the same object.
        replacement: Called with the arguments that `function` is given.
    """

    def __init__(self, function: types.FunctionType, replacement: Function) -> None:
        assert not function.__closure__
        self.function: Any = function
        self.stock = function.__code__
        key = f"{function.__module__}.{function.__qualname__}"
        constants = tuple(key if c == "key" else c for c in _forward.__code__.co_consts)
        self.ours = _forward.__code__.replace(co_consts=constants)
        _replacements[key] = replacement
        _ours.add(self.ours)

    def put_in(self) -> None:
        """Let the function run the replacement; `inspect.unwrap` and `inspect.signature` still find the stock one."""
        self.function.__wrapped__ = copied(self.function, self.function.__globals__, None)
        self.function.__code__ = self.ours

    def take_out(self) -> None:
        """Put back what was there, unless somebody has exchanged the code once more since."""
        if self.function.__code__ is self.ours:
            self.function.__code__ = self.stock
            del self.function.__wrapped__


def _forward(*args: object, **kwargs: object) -> object:
    from timm_resize.plugin.patch import run

    return run("key", args, kwargs)


def run(key: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Call the replacement of an exchanged function."""
    return _replacements[key](*args, **kwargs)


def copied(
    function: types.FunctionType, namespace: dict[str, object], cells: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    """Return a function that runs what `function` runs now, over other globals and cells."""
    copy = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
    return copy


def calling(function: Function, replaced: Mapping[Function, Function]) -> Function:
    """Return a copy of `function` that calls others in place of some that it gets to by way of its own package.

    Args:
        function: Where to start. It is returned as it is where it gets to none of `replaced`.
        replaced: Function → what to call in its place.
    """
    packages = {name.partition(".")[0] for f in (function, *replaced) if (name := getattr(f, "__module__", None))}
    return _calling(function, replaced, packages, {})


def _calling(
    function: Any, replaced: Mapping[Function, Function], packages: set[str], known: dict[Function, Function]
) -> Any:
    if not isinstance(function, types.FunctionType):
        return function
    if function in replaced or function in known:
        return replaced.get(function, known.get(function))
    if (function.__module__ or "").partition(".")[0] not in packages:
        return function
    known[function] = function  # also ends the way round a circle of calls
    namespace = function.__globals__
    found = {n: namespace[n] for n in _names(function.__code__) if n in namespace}
    new = {n: other for n, f in found.items() if (other := _calling(f, replaced, packages, known)) is not f}
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    cells = [_calling(f, replaced, packages, known) for f in held]
    if new or any(a is not b for a, b in zip(held, cells, strict=True)):
        known[function] = copied(function, {**namespace, **new}, tuple(map(types.CellType, cells)) or None)
    return known[function]


def _names(code: types.CodeType) -> set[str]:
    """Return the global names that a function may look up, in functions inside it too."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))
