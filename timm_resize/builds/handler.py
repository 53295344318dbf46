"""The handler of a class that `infer` taught: what differs between the builds at the old and at the new size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from timm_resize.builds.entry import RECORD, Entry, is_as_built, is_held
from timm_resize.builds.rules import Unclear
from timm_resize.builds.snapshot import Refused, Snapshot, changed_attributes, changed_buffers, structure
from timm_resize.builds.values import obstacle
from timm_resize.core.context import Changes, Context, Rebuild
from timm_resize.core.plan import MISSING, Change, shape_of, submodule
from timm_resize.core.registry import Handler
from timm_resize.errors import InvalidSizeError, UnsupportedModelError
from timm_resize.geometry import Size, ceil_div, short, times

ENTRIES = "inferred_entries"
"""Attribute of such a handler that holds its entries."""

STEPS = (16, 32, 14, 64)
"""Multiples that are tried for the nearest size that a build takes."""

T = TypeVar("T")


def entries_of(handler: Handler | None) -> tuple[Entry, ...]:
    """Return what `infer` found for a class; nothing where its handler was written by hand."""
    return getattr(handler.plan, ENTRIES, ()) if handler is not None else ()


def make_plan(entries: tuple[Entry, ...]) -> Callable[[nn.Module, Context], Changes]:
    """Return a handler that picks the entry whose build fits the model."""

    def plan_inferred(model: nn.Module, ctx: Context) -> Changes:
        """Set everything as the build at the new size has it, and carry the parameters over."""
        entry, old = _entry_for(model, ctx, entries)
        new = _at_new_size(entry, ctx)
        if reason := structure(old, new):
            raise _unsupported(ctx, f"{reason}. Write a handler with @timm_resize.register")
        ctx.skip(*model.children())
        for key, rule in entry.rules.items():
            path, _, name = key.rpartition(".")
            shapes = _some(old.shapes[key]), _some(new.shapes[key])
            try:
                how = rule.how(ctx, (old.size, new.size), shapes)
            except Unclear as why:
                raise _unsupported(ctx, f"{key} cannot be carried over: {why}. Choose another size near it") from None
            yield from ctx.parameter(_some(submodule(model, path)), name, how)
        for key, shape in new.shapes.items():
            if shape != old.shapes[key] and key not in entry.rules:
                sizes = f"sizes=[{old.size}, {new.size}, ...]"
                raise _unsupported(ctx, f"{key} differs between these sizes alone. Call infer with {sizes}")
        yield from _buffers(model, ctx, entry, old, new)
        yield from _attributes(model, ctx, old, new)
        if entry.runs:
            ctx.warn(f"whether it runs at that size was not tried, as its build does not on images alone: {entry.runs}")
        if not entry.size_attributes and _is_own_record(ctx):
            yield from ctx.attribute(model, **{RECORD: ctx.new_size})

    setattr(plan_inferred, ENTRIES, entries)
    return plan_inferred


def size_of(entries: tuple[Entry, ...]) -> Callable[[nn.Module], Size | None]:
    """Return the function that tells the image size of a model of any of the entries."""
    return lambda model: next(filter(None, (entry.size_of(model) for entry in entries)), None)


def _is_own_record(ctx: Context) -> bool:
    return not hasattr(ctx.root, "pretrained_cfg")  # where timm built it, the planner records the size


def _entry_for(model: nn.Module, ctx: Context, entries: tuple[Entry, ...]) -> tuple[Entry, Snapshot]:
    """Return the entry that a model is of, and its build at the model's present size."""
    if ctx.old_size is None and not all(entry.free for entry in entries):
        raise _unsupported(
            ctx,
            "its image size is not known: no attribute holds it, and its shapes are of none of the sizes tried. "
            f"Set model.{RECORD} = (H, W), the size that it was built at",
        )
    size, reasons = ctx.old_size or ctx.new_size, list[str]()
    for entry in entries:
        try:
            built = entry.at(size)
            reason = entry.misfit(model, built)
        except Refused as why:
            reason = str(why)
        if not reason:
            return entry, built
        reasons.append(reason)
    raise _unsupported(
        ctx,
        f"it is not as the build given to infer makes it at {size}: {reasons[-1]}. Call timm_resize.infer with "
        "a function that builds this configuration",
    )


def _at_new_size(entry: Entry, ctx: Context) -> Snapshot:
    """Return the build at the new size, refused where it cannot be built, or does not run."""
    reason = _trouble(entry, ctx.new_size)
    if reason:
        near = [size for size in dict.fromkeys(_around(ctx.new_size)) if not _trouble(entry, size)][:2]
        name = type(ctx.root).__name__
        advice = f"Use {' or '.join(map(short, near))}." if near else "No valid size was found near it."
        raise InvalidSizeError(
            f"{name}: img_size={ctx.new_size} {reason}. {advice}",
            model=name,
            argument="img_size",
            value=ctx.new_size,
            nearest=near,
        )
    return entry.at(ctx.new_size)


def _trouble(entry: Entry, size: Size) -> str:
    """Say why a size does not work, '' where it does."""
    if entry.one_side and size[0] != size[1]:
        return "is not square, and its build takes one side"
    try:
        built = entry.at(size)
    except Refused as why:
        return f"is refused by its build: {why}"
    failed = "" if entry.runs else built.ran.failed
    return f"is built, but does not run: {failed}" if failed else ""


def _around(size: Size) -> Iterator[Size]:
    """Yield sizes near one, in steps that models of practice take."""
    square = max(size), max(size)
    for base in dict.fromkeys((size, square)):
        for step in STEPS:
            yield times(ceil_div(base, step), step)


def _buffers(model: nn.Module, ctx: Context, entry: Entry, old: Snapshot, new: Snapshot) -> Changes:
    """Give every buffer that differs between the builds the new build's values."""
    for key in changed_buffers(old, new):
        path, _, name = key.rpartition(".")
        module = _some(submodule(model, path))
        before, after = old.buffers[key], new.buffers[key]
        if key in entry.random and shape_of(before) == shape_of(after):
            continue
        if not is_as_built(module._buffers.get(name), before):
            raise _unsupported(
                ctx,
                f"the buffer {key} depends on the size, and its values are not those of the build: training or loading "
                "has changed it. Write a handler with @timm_resize.register",
            )
        rule = Rebuild(as_built, (BuiltBuffer(id(entry), new.size, key, after),), like=_like(module, name))
        yield from ctx.buffer(module, name, shape_of(after), None if after is None else rule)


@dataclass(frozen=True)
class BuiltBuffer:
    """A buffer of a build, with what tells it from others: which entry, size and name."""

    entry: int
    size: Size
    key: str
    value: Tensor | None = field(compare=False, repr=False)


def as_built(of: BuiltBuffer, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a build's buffer on a device, of a type where it is of real numbers."""
    value = _some(of.value)
    return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)


def _like(module: nn.Module, name: str) -> str:
    """Return the name of a tensor whose device and type a buffer takes that is None so far; '' for its own."""
    if module._buffers.get(name) is not None:
        return ""
    others = (*module.named_parameters(), *module.named_buffers())
    return next((other for other, tensor in others if tensor.is_floating_point()), "")


def _attributes(model: nn.Module, ctx: Context, old: Snapshot, new: Snapshot) -> Iterator[Change]:
    """Set every attribute that differs between the builds, and empty what forward has filled since."""
    for path, name in changed_attributes(old, new):
        module, key = _some(submodule(model, path)), f"{path}.{name}".removeprefix(".")
        before, after = (s.attributes[path].get(name, MISSING) for s in (old, new))
        if what := obstacle(after):
            raise _unsupported(ctx, f"{key} depends on the size and holds {what}. Register that in its module")
        if not is_held(module, name, before):
            advice = "Call infer with a build that has it so"
            raise _unsupported(ctx, f"{key} is {module.__dict__.get(name)!r}, and {before!r} in the build. {advice}")
        yield from ctx.attribute(module, **{name: after})
    for path, held in old.attributes.items():
        module = _some(submodule(model, path))
        for name, value in held.items():
            now = module.__dict__.get(name)
            empty = value is None or (type(value) in (dict, list) and not value)  # as caches are before forward
            if empty and not is_held(module, name, value) and obstacle(now) == "a tensor":
                yield from ctx.attribute(module, **{name: value})


def _some(value: T | None) -> T:
    assert value is not None
    return value


def _unsupported(ctx: Context, what: str) -> UnsupportedModelError:
    name = type(ctx.root).__name__
    return UnsupportedModelError(f"{name}: {what}.", model=name)
