"""Class → handler, by MRO. Families load on first use; other packages add theirs by entry point."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

from torch import nn

from timm_resize.errors import ResizeError

ENTRY_POINT_GROUP = "timm_resize.handlers"


PlanFunction = Callable[..., Generator[Any, None, Any]]


F = TypeVar("F", bound=PlanFunction)


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
        guarded: Whether the plan may yield `ctx.guard`, so that a model built without a size gets its guard too.
        examples: Small registered models of this class, one per distinct configuration, with keywords that make
            them smaller still; tests and docs run them.
    """

    cls: type[nn.Module]
    plan: PlanFunction
    state: str = ""
    method: str = ""
    sizes: str = ""
    options: tuple[str, ...] = ()
    guarded: bool = False
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    @property
    def is_model(self) -> bool:
        """Whether this is a whole model rather than a layer."""
        return is_model_class(self.cls)

    @functools.cached_property
    def needs_geometry(self) -> str:
        """The first keyword that only another handler can give, '' when it can be called for a module on its own."""
        parameters = inspect.signature(self.plan).parameters.values()
        return next((p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty), "")


def _is_model_class(cls: type) -> bool:
    """Whether a class is one of timm's whole models: it has a classifier to reset, or gives features of its stages."""
    if hasattr(cls, "reset_classifier") or hasattr(cls, "forward_intermediates"):
        return True
    code = getattr(inspect.getattr_static(cls, "__init__"), "__code__", None)  # EfficientNetFeatures and the like
    return code is not None and "out_indices" in code.co_varnames and issubclass(cls, nn.Module)


is_model_class: Callable[[type], bool] = functools.cache(_is_model_class)


_handlers: dict[type, Handler] = {}


_loaded = False


_lock = threading.RLock()


def register(
    *classes: type[nn.Module],
    state: str = "",
    method: str = "",
    sizes: str = "any",
    options: tuple[str, ...] = (),
    guarded: bool = False,
    examples: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[F], F]:
    """Register a handler for one or more module classes, layers or whole models.

    The handler is a generator `def plan(module, ctx, *, ...)` that yields what `ctx` gives it
    (`ctx.attribute`, `ctx.parameter`, `ctx.buffer`, `ctx.visit`) and writes nothing. Keyword-only
    arguments are geometry that the calling handler passes through `ctx.visit(module, ...)`; give
    them defaults if the layer should also be found on its own.

    Args:
        classes: Module classes; a subclass without its own handler inherits.
        state: What depends on the size.
        method: How it is carried over.
        sizes: Which sizes are valid.
        options: Keywords that `set_input_size` takes beyond `img_size`.
        guarded: Whether the handler yields `ctx.guard`.
        examples: Small registered models of this class and keywords that shrink them, for tests and docs.

    Raises:
        ResizeError: Not a module class, or a signature that `ctx.visit` cannot call.
    """

    def wrap(plan: F) -> F:
        if not classes:
            raise ResizeError("register: no class given. Use @register(MyLayer).")
        _check_signature(plan)
        for cls in classes:
            if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
                raise ResizeError(f"register: {cls!r} is not a torch.nn.Module class. Use @register(MyLayer).")
            with _lock:
                _handlers[cls] = Handler(cls, plan, state, method, sizes, tuple(options), guarded, dict(examples or {}))
        return plan

    return wrap


def _check_signature(plan: PlanFunction) -> None:
    name = getattr(plan, "__name__", repr(plan))
    if not inspect.isgeneratorfunction(plan):
        raise ResizeError(f"register: {name} is not a generator function. Yield the changes (yield from ctx...).")
    parameters = list(inspect.signature(plan).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) != 2 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ResizeError(
            f"register: {name}{inspect.signature(plan)} cannot be called. Use def {name}(module, ctx, *, ...)."
        )


def handler_for(cls: type) -> Handler | None:
    """Return the handler of the nearest class in the MRO, None when there is none."""
    load_families()
    return next((_handlers[c] for c in cls.__mro__ if c in _handlers), None)


def handlers() -> list[Handler]:
    """Return every registered handler, sorted by class name."""
    load_families()
    return sorted(_handlers.values(), key=lambda h: h.cls.__name__)


def families() -> tuple[Handler, ...]:
    """Return what is registered for whole models: class, what depends on the size, method, valid sizes, options.

    Example:
        >>> import timm_resize
        >>> next(f.state for f in timm_resize.families() if f.cls.__name__ == "VisionTransformer")
        'pos_embed (1, prefix + h*w, dim)'
    """
    return tuple(h for h in handlers() if h.is_model)


def load_families() -> None:
    """Import every module of `timm_resize.handlers` and every entry point, once."""
    global _loaded
    if _loaded:
        return
    with _lock:
        if _loaded:
            return
        package = importlib.import_module("timm_resize.handlers")
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(info.name)
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            entry.load()
        _loaded = True
