"""What a handler sees while it plans: the request, the sizes, and the calls that make changes."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, overload

import torch
from torch import nn

from timm_resize.core.copies import meta_copy
from timm_resize.core.find import current_size as current_size  # for handlers of what holds a model
from timm_resize.core.find import find_model as find_model
from timm_resize.core.find import model_handler as model_handler
from timm_resize.core.find import walk
from timm_resize.core.hidden import View, unwrap
from timm_resize.core.plan import MISSING as MISSING  # for handlers, which import from here
from timm_resize.core.plan import Change as Change
from timm_resize.core.plan import Rebuild as Rebuild
from timm_resize.core.plan import Reinitialise as Reinitialise
from timm_resize.core.registry import Handler, handler_for
from timm_resize.core.request import Request
from timm_resize.core.tensors import Tensors
from timm_resize.errors import ResizeError, UnsupportedModelError
from timm_resize.geometry import Size, parse_size, stage_sizes

Changes = Generator[Change, None, Any]
"""What a handler is: it yields changes, and may return what the handler that visits it needs to know."""

T = TypeVar("T")

Returning = Generator[Change, None, T]
"""The same for a handler that returns a T: `Returning[Grids]`."""


@dataclass(frozen=True)
class Grids:
    """What the handler of a patch embedding returns: how it cuts the image.

    Attributes:
        old: Grid (h, w) so far.
        new: Grid (h, w) that forward makes of the new size.
        reduction: Pixels per cell, along the longer side where they differ.
    """

    old: Size
    new: Size
    reduction: int


SIZE_ERRORS = (RuntimeError, ValueError, IndexError, AssertionError, ZeroDivisionError)
"""What torch's and timm's layers raise for a map that does not suit them; out of memory, a RuntimeError, is not one."""


class Invalid(Exception):  # noqa: N818  (a signal between handler and planner, never seen by users)
    """Raised by a handler for a size that cannot work; the planner adds the nearest valid ones."""


class Context(Tensors):
    """Passed to every handler of one plan. Reads the model, never writes to it."""

    def __init__(
        self, root: nn.Module, request: Request, old_size: Size | None, new_size: Size, view: View | None = None
    ) -> None:
        """Start a plan of `root`, whose image size goes from `old_size` to `new_size`, as `view` shows it."""
        view = unwrap(root, walk(root))[0] if view is None else view
        super().__init__(view, request, new_size)
        self.old_size = old_size
        self.model_args: dict[str, object] = {}
        self.built_args: dict[str, object] = {}
        self.models: list[nn.Module] = []  # whole models inside the root, whose bookkeeping is theirs
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._modules = view.modules
        self._visited: set[int] = set()

    @overload
    def visit(self, module: nn.Module, **geometry: Any) -> Changes: ...
    @overload
    def visit(self, module: nn.Module, returns: type[T], **geometry: Any) -> Returning[T]: ...
    def visit(self, module: nn.Module, returns: type | None = None, **geometry: Any) -> Changes:
        """Hand `module` to its own handler; returns what that returns.

        Args:
            module: A submodule of the model.
            returns: Type of what the caller needs back, e.g. `Grids` of a patch embedding; None for anything.
            geometry: The keyword-only arguments of the module's handler.

        Raises:
            UnsupportedModelError: Its type has no handler, or one that returns something else.
            ResizeError: A keyword that its handler does not take, or lacks.
        """
        handler = handler_for(type(module)) or model_handler(module)  # a feature wrapper has its model's
        if handler is None:
            raise self._unsupported(
                f"{self.path(module)} is a {type(module).__name__}, which has no handler. Put the layer that it stands "
                "for in its place for the resize, or write a handler with @timm_resize.register."
            )
        if not handler.required <= geometry.keys() <= handler.keywords:
            raise self._misuse("visit", module, _wrong_keyword(handler, geometry))
        self.skip(module)
        if handler.is_model:
            self.models.append(module)
            result = yield from self._on_its_own(handler, module, **geometry)
        else:
            result = yield from self._run(handler, module, **geometry)
        if returns is not None and not isinstance(result, returns):
            raise UnsupportedModelError(
                f"{type(self.root).__name__}: the handler of {type(module).__name__} ({self.path(module)}) returns "
                f"{result!r}, and its model needs {returns.__name__}. End it with return {returns.__name__}(...)."
            )
        return result

    def _on_its_own(self, handler: Handler, model: nn.Module, **geometry: Any) -> Changes:
        """Run the handler of a model inside the root, with that model as the root, and visit what it leaves."""
        outer, self.root = self.root, model
        try:
            result = yield from self._run(handler, model, **geometry)
            yield from self.visit_rest()
        finally:
            self.root = outer
        return result

    def _run(self, handler: Handler, module: nn.Module, **geometry: Any) -> Changes:
        """Run a handler, and see that it yields changes."""
        plan = handler.plan(module, self, **geometry)
        while True:
            try:
                change = next(plan)
            except StopIteration as stop:
                return stop.value
            except ResizeError:
                raise
            except (AttributeError, TypeError, LookupError, ValueError) as error:  # a layer that is not as it was built
                lacks = getattr(error, "obj", None)  # of an AttributeError: what has no such attribute
                other = lacks if isinstance(lacks, nn.Module) and id(lacks) in self._paths else module
                raise self._unsupported(
                    f"the handler of {handler.cls.__name__} cannot read {self.path(other) or 'the model'}, a "
                    f"{type(other).__name__} ({type(error).__name__}: {error}). Undo the change to it for the resize, "
                    "or write a handler with @timm_resize.register."
                ) from error
            if not isinstance(change, Change):
                what = (
                    f"{handler.plan.__name__} yields {change!r}, not a change. Write 'yield from' before calls of ctx."
                )
                raise self._misuse("visit", module, what)
            yield change

    def skip(self, *modules: nn.Module) -> None:
        """Leave modules, and what is inside them, to the handler that calls this: their own are not called."""
        self._visited.update(map(id, modules))

    def visit_rest(self) -> Changes:
        """Visit every module with a handler that no handler has visited, outermost first."""
        found: dict[type, Handler | None] = {}
        places = (i for i, (_, module, _) in enumerate(self._modules) if module is self.root)
        index = next(places, 0)
        end_of_root, index = self._modules[index][2], index + 1
        while index < end_of_root:
            path, module, end = self._modules[index]
            if id(module) in self._visited:
                index = end  # what is inside a visited module counts as visited, too
                continue
            cls = type(module)
            handler = found[cls] if cls in found else found.setdefault(cls, handler_for(cls))
            if handler is None or handler.is_model:
                index += 1
                continue
            if handler.needs_geometry:
                raise UnsupportedModelError(
                    f"{type(self.root).__name__}: {path} is a {type(module).__name__}, whose {handler.needs_geometry} "
                    "only its model knows. Write a handler for the model with @timm_resize.register."
                )
            yield from self.visit(module)

    def sequence(self, owner: nn.Module, name: str) -> list[Any]:
        """Return the members of `owner.<name>`, also when a feature wrapper flattened them to `<name>_0` ….

        A wrapper keeps only the stages that its features need, so the list may end early.
        """
        if name in owner._modules:
            return list(owner.get_submodule(name)._modules.values())  # children() leaves out what is there twice
        flat = {k: m for k, m in owner._modules.items() if k.startswith(f"{name}_") and k[len(name) + 1 :].isdigit()}
        return [m for _, m in sorted(flat.items(), key=lambda kv: int(kv[0][len(name) + 1 :])) if m is not None]

    def meta_copy(self, module: nn.Module) -> nn.Module:
        """Return a copy of `module` without weights, in eval mode, to run for shapes; made once per request."""
        kept = self.request.copies
        if id(module) not in kept:
            kept[id(module)] = module, meta_copy(module).eval()
        return kept[id(module)][1]

    def output_size(self, *parts: nn.Module, channels: int) -> Size:
        """Return (h, w) of the (last) map that `parts`, one after another, make of an image of the new size.

        Run on the meta device, so no value is computed. A size that they cannot take is refused.

        Args:
            parts: Submodules of the model.
            channels: Channels of the image.
        """
        copies = [self.meta_copy(part) for part in parts]
        dtype = next((p.dtype for copy in copies for p in copy.parameters()), torch.float32)
        out: Any = torch.empty(1, channels, *self.new_size, device="meta", dtype=dtype)
        try:
            with torch.no_grad():
                for copy in copies:
                    out = copy(out)
        except torch.cuda.OutOfMemoryError:  # says nothing of the size
            raise
        except SIZE_ERRORS as error:
            self.invalid(f"does not pass {self.path(parts[0])} ({error})")
        out = out[-1] if isinstance(out, (list, tuple)) else out
        return int(out.shape[-2]), int(out.shape[-1])

    def option(self, name: str, default: Any = None) -> Any:
        """Return a family keyword as the caller gave it."""
        return self.request.options.get(name, default)

    def window_sizes(self, stages: int) -> tuple[Size, ...] | None:
        """Return the `window_size` option as one (h, w) per stage, None when it was not given.

        A feature wrapper that keeps only its first stages takes the windows of all, and uses the first.
        """
        value = self.option("window_size")
        if type(self.root).__module__ == "timm.models._features" and isinstance(value, (list, tuple)):
            value = value if len(value) <= max(stages, 2) else value[:stages]
        return None if value is None else stage_sizes(value, stages, "window_size", type(self.root).__name__)

    def size_option(self, name: str) -> Size | None:
        """Return an option as (h, w), None when it was not given."""
        value = self.option(name)
        return None if value is None else parse_size(value, name, type(self.root).__name__)

    def record(self, *, built: bool = False, **model_args: object) -> None:
        """Note constructor arguments that a stock rebuild of the resized model needs, None for 'as it was'.

        With `built` they are recorded for a model built at the size too, where `img_size` alone would not do.
        """
        given = {k: v for k, v in model_args.items() if v is not None}
        self.model_args.update(given)
        if built or self.request.window_policy != "timm":
            self.built_args.update(given)

    def invalid(self, reason: str) -> NoReturn:
        """Refuse the size. `reason` continues 'img_size=(230, 230) …' and gives the numbers."""
        raise Invalid(reason)

    def warn(self, text: str) -> None:
        """Warn the user when the plan is applied."""
        if text not in self.warnings:
            self.warnings.append(text)

    def warn_dropped(self, rest: Sequence[int], why: str) -> None:
        """Warn that the last `rest` rows and columns of pixels play no part, if any; `why` says it in numbers."""
        rows, columns = (max(side, 0) for side in rest)
        if rows or columns:
            pixels = f"{rows} rows and {columns} columns of pixels at the bottom and right"
            self.warn(f"img_size={self.new_size} drops {pixels}: {why}.")

    def note(self, text: str) -> None:
        """Add a remark to the plan."""
        if text not in self.notes:
            self.notes.append(text)


def _wrong_keyword(handler: Handler, geometry: Mapping[str, object]) -> str:
    """Say which keyword of `ctx.visit` is not the handler's, or which is missing, and what to write."""
    name, takes = handler.plan.__name__, [f"{word}=..." for word in sorted(handler.keywords)]
    call = f"Write ctx.visit({', '.join(['module', *takes])})."
    for word in geometry:
        if word not in handler.keywords:
            return f"its handler {name} does not take {word}=. {call}"
    return f"its handler {name} needs {min(handler.required - geometry.keys())}=, which was not given. {call}"


def check_options(root: nn.Module, options: Mapping[str, object], known: Sequence[str]) -> None:
    """Raise ResizeError for an option the family does not have, naming those it has."""
    for name in options:
        if name not in known:
            what = f"{name}={options[name]!r} is not an option of this model"
            raise ResizeError(f"{type(root).__name__}: {what}. Use {', '.join(['img_size', *sorted(known)])}.")
