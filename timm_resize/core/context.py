"""What a handler sees while it plans: the request, the sizes, and the calls that make changes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, overload

import torch
from torch import nn

from timm_resize.core.copies import meta_copy
from timm_resize.core.find import Walk, walk
from timm_resize.core.input_check import GUARD, guard_of
from timm_resize.core.maps import Maps
from timm_resize.core.plan import CACHE, MISSING, Change, Rebuild, Reinitialise, same_value, shape_of
from timm_resize.core.registry import Handler, handler_for
from timm_resize.core.request import Request
from timm_resize.errors import ResizeError, UnsupportedModelError
from timm_resize.geometry import Size, parse_size, stage_sizes, text
from timm_resize.resample import Resample, maps

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


class Context(Maps):
    """Passed to every handler of one plan. Reads the model, never writes to it."""

    def __init__(
        self, root: nn.Module, request: Request, old_size: Size | None, new_size: Size, modules: Walk | None = None
    ) -> None:
        """Start a plan of `root`, whose image size goes from `old_size` to `new_size`; `modules` are its `walk`."""
        super().__init__(request)
        self.root = root
        self.old_size = old_size
        self.new_size = new_size
        self.model_args: dict[str, object] = {}
        self.built_args: dict[str, object] = {}
        self.models: list[nn.Module] = []  # whole models inside the root, whose bookkeeping is theirs
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._modules = walk(root) if modules is None else modules
        self._paths = {id(m): path for path, m, _ in self._modules}
        self._seen: set[tuple[int, str]] = set()
        self._visited: set[int] = set()

    def attribute(self, module: nn.Module, **values: object) -> Iterator[Change]:
        """Set Python attributes of `module`; those that already hold the value are left out.

        An empty dict empties a cache, which forward may fill between the plan and its use: never left out.
        """
        for name, new in values.items():
            if isinstance(new, dict) and not new and self._first(module, name):
                yield Change(self.path(module), name, "attribute", CACHE, new)
                continue
            old = module.__dict__.get(name, MISSING)
            if not same_value(old, new) and self._first(module, name):
                yield Change(self.path(module), name, "attribute", old, new)

    def parameter(self, module: nn.Module, name: str, how: Resample) -> Iterator[Change]:
        """Resample a parameter of `module` (None is left alone); nothing when the map is the identity.

        Raises:
            ResizeError: `module` has no such parameter, or `how` is not a map.
            UnsupportedModelError: The parameter has another shape than the map is for.
        """
        tensor = module._parameters.get(name)
        if tensor is None and getattr(module, name, MISSING) is not None:
            raise self._misuse("parameter", module, f"it has no parameter {name!r}. {_names(module._parameters)}")
        if not isinstance(how, Resample):
            advice = "Give a map of ctx, such as ctx.pos_embed(old, new), or a Resample."
            raise self._misuse("parameter", module, f"how={how!r} of {name!r} is not a map. {advice}")
        if tensor is None or how.is_identity or not self._first(tensor, ""):
            return
        try:
            new = how.shape(tensor.shape)
        except ValueError as error:
            raise UnsupportedModelError(
                f"{type(self.root).__name__}: {self.path(module)}.{name} does not have its type's shape: {error}. Undo "
                f"the change to that {type(module).__name__}, or give the sizes that it is for in its handler."
            ) from None
        yield Change(self.path(module), name, "parameter", shape_of(tensor), new, how)

    def buffer(
        self, module: nn.Module, name: str, shape: Sequence[int] | None, how: Rebuild | Reinitialise | None = None
    ) -> Iterator[Change]:
        """Replace a buffer of `module` by one of `shape` (None: by None). Yield only when it does change.

        Raises:
            ResizeError: `module` has no such buffer, or a `shape` comes without a rule that can fill it.
        """
        if not self._first(module, name):
            return
        if name not in module._buffers:
            raise self._misuse("buffer", module, f"it has no buffer {name!r}. {_names(module._buffers)}")
        old = shape_of(module._buffers[name])
        new = None if shape is None else tuple(shape)
        if new is not None:
            self._check_rule(module, name, new, how)
        if old is not None or new is not None:
            yield Change(self.path(module), name, "buffer", old, new, None if new is None else how)

    def _check_rule(self, module: nn.Module, name: str, shape: tuple[int, ...], how: object) -> None:
        rebuild = "Give Rebuild(function, args)"
        if not isinstance(how, (Rebuild, Reinitialise)):
            what = f"how={how!r} is no rule for {name!r} of shape {shape}. {rebuild} or Reinitialise()."
        elif isinstance(how, Reinitialise) and not hasattr(module, "init_non_persistent_buffers"):
            what = f"it has no init_non_persistent_buffers, which Reinitialise() of {name!r} calls. {rebuild}."
        elif isinstance(how, Rebuild) and not how.like and module._buffers[name] is None:
            what = (
                f"{name!r} is None, without device and dtype. Give Rebuild(..., like='weight'), a tensor that it has."
            )
        else:
            return
        raise self._misuse("buffer", module, what)

    def guard(self, module: nn.Module, grid: Callable[[Size], Size], given: Size | None = None) -> Iterator[Change]:
        """Let `module` refuse an input that gives another grid than the new size does.

        For models whose forward runs there, and is silently wrong.

        Args:
            module: Submodule that is given the image, or the map (h, w) of `given`; a tensor (batch, channels, h, w).
            grid: (h, w) given → (h, w) of the grid that the weights are for.
            given: What `module` is given at the new size, None for the image.
        """
        size = self.new_size if given is None else given
        yield from self.attribute(module, **{GUARD: guard_of(type(self.root).__name__, self.new_size, size, grid)})

    def flatten_linear(
        self, linear: nn.Linear, old: Size, new: Size, *, channels_last: bool = False, pool: bool = False
    ) -> Iterator[Change]:
        """Resize a linear layer that reads a flattened map: (channels, h, w), or (h, w, channels) if last.

        Args:
            linear: The layer; its `in_features` is channels * h * w.
            old: (h, w) of the map so far.
            new: (h, w) of the map at the new size.
            channels_last: How the map is flattened.
            pool: Read it as through an adaptive average pool to the old grid, not as the old map resized.

        Raises:
            UnsupportedModelError: `in_features` is no multiple of the old map.
        """
        channels, rest = divmod(linear.in_features, old[0] * old[1])
        if rest:
            raise UnsupportedModelError(
                f"{type(self.root).__name__}: {self.path(linear)} reads {linear.in_features} features, no multiple of "
                f"a {text(old)} map. Give the map that it was made for."
            )
        how = maps.flatten_linear(
            old, new, channels=channels, channels_last=channels_last, pool=pool, **self.interpolation()
        )
        yield from self.parameter(linear, "weight", how)
        yield from self.attribute(linear, in_features=channels * new[0] * new[1])

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
        handler = handler_for(type(module))
        if handler is None:
            raise UnsupportedModelError(
                f"{type(self.root).__name__}: {self.path(module)} is a {type(module).__name__}, which has no handler. "
                "Write one with @timm_resize.register."
            )
        if not handler.required <= geometry.keys() <= handler.keywords:
            raise self._misuse("visit", module, _wrong_keyword(handler, geometry))
        self.skip(module)
        if handler.is_model:
            self.models.append(module)
        result = yield from self._run(handler, module, **geometry)
        if returns is not None and not isinstance(result, returns):
            raise UnsupportedModelError(
                f"{type(self.root).__name__}: the handler of {type(module).__name__} ({self.path(module)}) returns "
                f"{result!r}, and its model needs {returns.__name__}. End it with return {returns.__name__}(...)."
            )
        return result

    def _run(self, handler: Handler, module: nn.Module, **geometry: Any) -> Changes:
        """Run a handler, and see that it yields changes."""
        plan = handler.plan(module, self, **geometry)
        while True:
            try:
                change = next(plan)
            except StopIteration as stop:
                return stop.value
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
        index = 1
        while index < len(self._modules):
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

    def path(self, module: nn.Module) -> str:
        """Return the module's dotted path in the root, '' for the root.

        Raises:
            ResizeError: The module is not in the root.
        """
        path = self._paths.get(id(module))
        if path is None:
            name = type(self.root).__name__
            raise ResizeError(
                f"{name}: ctx was given a {type(module).__name__} that is not in the {name}. Give modules of ctx.root, "
                "not copies, nor what is not registered in it."
            )
        return path

    def sequence(self, owner: nn.Module, name: str) -> list[Any]:
        """Return the members of `owner.<name>`, also when a feature wrapper flattened them to `<name>_0` ….

        A wrapper keeps only the stages that its features need, so the list may end early.
        """
        if name in owner._modules:
            return list(owner.get_submodule(name).children())
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

    def _misuse(self, call: str, module: nn.Module, what: str) -> ResizeError:
        """Return the error of a handler that calls `ctx` wrongly."""
        where = f"a {type(module).__name__} ({self.path(module) or 'the model'})"
        return ResizeError(f"{type(self.root).__name__}: ctx.{call} of {where}: {what}")

    def _first(self, thing: object, name: str) -> bool:
        """Whether (thing, name) was not changed before in this plan: shared modules and tied parameters."""
        key = (id(thing), name)
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


def _names(tensors: Mapping[str, object]) -> str:
    return f"Use one of {', '.join(tensors)}." if tensors else "It has none."


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
