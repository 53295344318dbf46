"""Class → handler, by MRO. Handlers load on first use; other packages add theirs by entry point."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TypeVar

from torch import nn

from timm_resize.core.locks import Lock
from timm_resize.core.plan import Change
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size

PACKAGE = "timm_resize.handlers"
"""Package whose modules register our own handlers, and group of the entry points that name those of others."""

LIBRARIES = f"{PACKAGE}.libraries"
"""Handlers for models of other libraries: `<library>.<last part of the name of the module that has the classes>`.

Each file is imported when a class of that module is first met, so a library that nobody uses is not imported.
"""

Plan = Callable[..., Generator[Change, None, object]]
P = TypeVar("P", bound=Plan)
Examples = Mapping[str, Mapping[str, object]]
SizeOf = Callable[..., Size | None]


@dataclass(frozen=True)
class Handler:
    """How one class of module follows the image size.

    Attributes:
        cls: The module class; subclasses inherit the handler.
        plan: Generator `(module, ctx, *, ...) -> changes`; writes nothing.
        state: What depends on the size, for the table of families; '' when nothing does.
        method: How it is carried over, for the same table.
        sizes: Which sizes are valid, for the same table.
        options: Keywords beyond `img_size` that the model's `set_input_size` takes.
        guarded: Whether the plan may yield `ctx.guard` or empty a cache, so that a model built without a size gets its
            checks too.
        examples: Small registered models of this class, one per distinct configuration, with keywords that make
            them smaller still; tests and docs run them.
        size: Of a whole model that is not timm's: gives a model's present image size (H, W), None when it has none.
    """

    cls: type[nn.Module]
    plan: Plan
    state: str = ""
    method: str = ""
    sizes: str = ""
    options: tuple[str, ...] = ()
    guarded: bool = False
    examples: Examples = field(default_factory=dict, hash=False)
    size: SizeOf | None = None

    @property
    def is_model(self) -> bool:
        """Whether this is a whole model rather than a layer."""
        return self.size is not None or is_model_class(self.cls)

    @functools.cached_property
    def keywords(self) -> frozenset[str]:
        """The geometry that the handler takes: its keyword-only arguments."""
        return frozenset(p.name for p in _parameters(self.plan) if p.kind is p.KEYWORD_ONLY)

    @functools.cached_property
    def required(self) -> frozenset[str]:
        """Those of its keywords that have no default: only another handler can give them."""
        return frozenset(p.name for p in _parameters(self.plan) if p.name in self.keywords and p.default is p.empty)

    @functools.cached_property
    def needs_geometry(self) -> str:
        """The first keyword that only another handler can give, '' when it can be called for a module on its own."""
        return next((p.name for p in _parameters(self.plan) if p.name in self.required), "")


def _parameters(plan: Plan) -> list[inspect.Parameter]:
    return list(inspect.signature(plan).parameters.values())


def _is_model_class(cls: type) -> bool:
    """Whether a class is one of timm's whole models: it has a classifier to reset, or gives features of its stages."""
    if hasattr(cls, "reset_classifier") or hasattr(cls, "forward_intermediates"):
        return True
    code = getattr(inspect.getattr_static(cls, "__init__"), "__code__", None)  # EfficientNetFeatures and the like
    return code is not None and "out_indices" in code.co_varnames and issubclass(cls, nn.Module)


is_model_class: Callable[[type], bool] = functools.cache(_is_model_class)


def _takes_img_size(cls: type) -> bool:
    """Whether the class's constructor has `img_size`."""
    return "img_size" in inspect.signature(cls).parameters


takes_img_size: Callable[[type], bool] = functools.cache(_takes_img_size)


class Registry:
    """The handlers of one process, by module class. Any thread may read and write it."""

    def __init__(self) -> None:
        self._handlers: Mapping[type, Handler] = {}  # replaced at each write, so readers need no lock
        self._writing = Lock()
        # Two locks, as whoever registers may hold the import lock of a module that an entry point names.
        self._own, self._others = _Once(_import_own), _Once(self._import_others)
        self._met: frozenset[str] = frozenset()  # modules whose classes have their handlers, if there are any

    def register(
        self,
        *classes: type[nn.Module] | str,
        state: str = "",
        method: str = "",
        sizes: str = "any",
        options: tuple[str, ...] = (),
        guarded: bool = False,
        examples: Examples | None = None,
        size: SizeOf | None = None,
    ) -> Callable[[P], P]:
        """Register a handler for one or more module classes, layers or whole models.

        The handler is a generator `def plan(module, ctx, *, ...)` that yields what `ctx` gives it
        (`ctx.attribute`, `ctx.parameter`, `ctx.buffer`, `ctx.visit`) and writes nothing. Keyword-only
        arguments are geometry that the calling handler passes through `ctx.visit(module, ...)`; give
        them defaults if the layer should also be found on its own.

        Args:
            classes: Module classes; a subclass without its own handler inherits. The dotted name of a class that not
                every version of its library has may stand for it: where there is none, nothing is registered.
            state: What depends on the size.
            method: How it is carried over.
            sizes: Which sizes are valid.
            options: Keywords that `set_input_size` takes beyond `img_size`.
            guarded: Whether the handler yields `ctx.guard`, or empties a cache.
            examples: Small registered models of this class and keywords that shrink them, for tests and docs. A
                whole model with `state` must give them; {} for one that `timm.create_model` does not build.
            size: For a whole model that is not timm's: `model -> (H, W)` or None, its image size as it stands. The
                handler keeps that right by its own changes, as nothing else is recorded in such a model.

        Raises:
            ResizeError: Not a module class, one that has a handler already, a whole model with `state` but without
                `examples`, or a signature that `ctx.visit` cannot call.
        """
        if not classes:
            raise ResizeError("register: no class given. Use @register(MyLayer).")
        if isinstance(options, str):
            raise ResizeError(f"register: options={options!r} is a string. Use options=({options!r},).")
        found = [cls for cls in map(_resolved, classes) if cls is not None]
        for cls in found:
            _check_class(cls, state if examples is None and size is None else "")

        def wrap(plan: P) -> P:
            _check_signature([cls if isinstance(cls, str) else cls.__name__ for cls in classes], plan)
            if not plan.__module__.startswith(f"{PACKAGE}."):
                self._own()  # or a class that we have a handler for would be taken now, and be a double later
            rest = (state, method, sizes, tuple(options), guarded, dict(examples or {}), size)
            with self._writing:
                for cls in found:
                    if cls in self._handlers:
                        raise ResizeError(_double(cls, plan, self._handlers[cls].plan))
                self._handlers = {**self._handlers, **{cls: Handler(cls, plan, *rest) for cls in found}}
            return plan

        return wrap

    def unregister(self, cls: type[nn.Module]) -> None:
        """Forget the handler of a class; its modules follow that of a base class then, if one has any.

        Raises:
            ResizeError: The class has no handler of its own.
        """
        self._own()
        with self._writing:
            if cls not in self._handlers:
                base = next((c for c in getattr(cls, "__mro__", ()) if c in self._handlers), None)
                advice = f"Use unregister({base.__name__}), whose handler it inherits." if base else "Leave it out."
                name = getattr(cls, "__name__", repr(cls))
                raise ResizeError(f"unregister({name}): the class has no handler of its own. {advice}")
            self._handlers = {c: h for c, h in self._handlers.items() if c is not cls}

    @contextmanager
    def override(self, *classes: type[nn.Module]) -> Iterator[None]:
        """Let a test register handlers: at the end of the `with` block the registry is as it was before.

        Inside it `classes` have no handler of their own, so they may be registered anew. All threads see it.

        Example:
            >>> import timm_resize
            >>> from timm.models.levit import Levit
            >>> with timm_resize.registry.override(Levit):
            ...     Levit in [handler.cls for handler in timm_resize.families()]
            False
            >>> Levit in [handler.cls for handler in timm_resize.families()]
            True
        """
        self.load()
        with self._writing:
            before = self._handlers
            self._handlers = {c: h for c, h in before.items() if c not in classes}
        try:
            yield
        finally:
            with self._writing:  # those of a library that was first met inside stay
                late = {c: h for c, h in self._handlers.items() if h.plan.__module__.startswith(f"{LIBRARIES}.")}
                self._handlers = {**late, **before}

    def handler_for(self, cls: type) -> Handler | None:
        """Return the handler of the nearest class in the MRO, None when there is none.

        Raises:
            ResizeError: Handlers for that class's module cannot be loaded with the version of its library at hand.
        """
        self.load()
        for base in cls.__mro__:
            if base.__module__ not in self._met:
                _import_library(base.__module__)
                self._met |= {base.__module__}
        known = self._handlers
        return next((known[c] for c in cls.__mro__ if c in known), None)

    def handlers(self) -> list[Handler]:
        """Return every registered handler, sorted by class name, then by where the class is."""
        self.load()
        return sorted(self._handlers.values(), key=lambda h: (h.cls.__name__, h.cls.__module__))

    def load(self) -> None:
        """Import every module of `timm_resize.handlers` and every entry point, once.

        Raises:
            ResizeError: An entry point cannot be loaded, each time until it can: without its handlers a layer of
                that package would silently keep its old size.
        """
        self._own()
        self._others()

    def _import_others(self) -> None:
        for entry in entry_points(group=PACKAGE):
            before = self._handlers
            try:
                entry.load()
            except Exception as error:  # code of another package raises what it likes
                with self._writing:  # what it did register must not be a double at the next attempt
                    self._handlers = before
                origin = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
                raise ResizeError(
                    f"entry point {entry.name} = {entry.value}{origin} in the group {PACKAGE} cannot be loaded: "
                    f"{type(error).__name__}: {error}. Repair or uninstall that package."
                ) from error


class _Once:
    """Calls a function until it has succeeded once; threads wait for the one that is at it."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function, self.done, self.lock = function, False, Lock()

    def __call__(self) -> None:
        if not self.done:
            with self.lock:
                if not self.done:
                    self.function()
                    self.done = True


def _import_own() -> None:
    package = importlib.import_module(PACKAGE)
    for info in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if not info.name.startswith(f"{LIBRARIES}."):
            importlib.import_module(info.name)


@functools.cache
def _libraries() -> frozenset[str]:
    """Return the names of the files that teach other libraries' modules."""
    package = importlib.import_module(LIBRARIES)
    return frozenset(info.name for info in pkgutil.walk_packages(package.__path__, f"{LIBRARIES}."))


def _import_library(module: str) -> None:
    """Import the file for a module of another library, if there is one."""
    library, _, rest = module.partition(".")
    name = f"{LIBRARIES}.{library}.{rest.rpartition('.')[-1]}"
    if name not in _libraries():
        return
    try:
        importlib.import_module(name)
    except (ImportError, AttributeError) as error:
        raise ResizeError(
            f"{name}, the handlers for {module}, cannot be loaded: {error}. Install the version of {library} that "
            "docs/coverage.md names, or resize its models with a handler of your own."
        ) from error


def _resolved(cls: type[nn.Module] | str) -> type[nn.Module] | None:
    """Return the class that a dotted name stands for, None where the version at hand has none."""
    if not isinstance(cls, str):
        return cls
    home, _, name = cls.rpartition(".")
    try:
        return getattr(importlib.import_module(home), name, None)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{home}.".startswith(f"{error.name}."):
            return None
        raise


def _check_class(cls: object, state: str) -> None:
    """Raise ResizeError for what is no module class, or a whole model with `state` that no examples are given of."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ResizeError(f"register: {cls!r} is not a torch.nn.Module class. Use @register(MyLayer).")
    if state and is_model_class(cls):
        raise ResizeError(
            f"register({cls.__name__}): examples is missing, and the whole model has state={state!r}. Use "
            "examples={'registered_name': {'depth': 1}}, or {} where timm.create_model does not build it."
        )


def _check_signature(names: list[str], plan: Plan) -> None:
    owner, name = f"register({names[0]})", getattr(plan, "__name__", repr(plan))
    if not inspect.isgeneratorfunction(plan):
        raise ResizeError(f"{owner}: {name} is not a generator function. Yield the changes (yield from ctx...).")
    parameters = _parameters(plan)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) != 2 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ResizeError(
            f"{owner}: {name}{inspect.signature(plan)} cannot be called. Use def {name}(module, ctx, *, ...)."
        )


def _double(cls: type, plan: Plan, first: Plan) -> str:
    return (
        f"register({cls.__name__}): {plan.__name__} would be its second handler, after {first.__module__}."
        f"{first.__name__}. Call timm_resize.unregister({cls.__name__}) first, or register inside "
        f"'with timm_resize.registry.override({cls.__name__})', which undoes it."
    )


registry = Registry()
"""The registry that every plan reads."""

register = registry.register
unregister = registry.unregister
handler_for = registry.handler_for
handlers = registry.handlers


def families() -> tuple[Handler, ...]:
    """Return what is registered for whole models: class, what depends on the size, method, valid sizes, options.

    Example:
        >>> import timm_resize
        >>> next(f.state for f in timm_resize.families() if f.cls.__name__ == "Cait")
        'pos_embed (1, h*w, dim), no prefix'
    """
    return tuple(h for h in registry.handlers() if h.is_model)
