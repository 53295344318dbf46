"""From a model and a request to a plan, and the sizes that a model can take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import nn
from typing_extensions import Unpack

from timm_resize.core.context import Context, Invalid, check_options
from timm_resize.core.dry_run import CannotRun, failure, misfit, other_linear, strangers
from timm_resize.core.find import TRAIT, Walk, current_size, refuse_state, root_handler, walk, whole_models
from timm_resize.core.hidden import parameters, tied_elsewhere, unwrap
from timm_resize.core.memory import memory_note
from timm_resize.core.plan import MISSING, Change, ResizePlan, same_value
from timm_resize.core.registry import Handler, handler_for, takes_img_size
from timm_resize.core.request import Request, ResizeOptions, make_request, nothing_asked
from timm_resize.errors import InvalidSizeError, ResizeError, UnsupportedModelError
from timm_resize.geometry import Size, SizeLike, short


def plan_to(
    root: nn.Module, img_size: SizeLike | None = None, *, constructing: bool = False, **options: Unpack[ResizeOptions]
) -> ResizePlan:
    """Plan a resize of a model that `find_model` returned."""
    return plan_request(root, make_request(type(root).__name__, img_size, constructing=constructing, **options))


def plan_request(root: nn.Module, request: Request) -> ResizePlan:
    """Plan a checked request on a model that `find_model` returned."""
    name, old = type(root).__name__, current_size(root)
    new = request.img_size or old
    if new is None:
        raise InvalidSizeError(
            f"{name}: img_size=None and the model records no size. Use img_size=224.", model=name, argument="img_size"
        )
    if nothing_asked(request) and new == old:
        return ResizePlan(name, old, new)
    modules = walk(root)
    refuse_state(root, modules)
    try:
        plan, tied = _plan(root, request, old, new, modules)
    except Invalid as refusal:
        raise _refused(root, request, new, str(refusal)) from None
    odd = {} if tied is None else {**strangers(root, modules), **tied}
    return _dry_run(root, request, plan, odd) if odd else plan


def _dry_run(root: nn.Module, request: Request, plan: ResizePlan, odd: dict[str, nn.Module]) -> ResizePlan:
    """Refuse a plan that modules without a handler do not follow; warn where that cannot be told."""
    (h, w), name = plan.new_size, type(root).__name__
    if path := other_linear(plan, odd):
        raise UnsupportedModelError(
            f"{name}: {path} is a {type(odd[path]).__name__}, which does not compute what a torch.nn.Linear with its "
            "weight does. Put the plain layer in its place for the resize, merged with what was added to it.",
            model=name,
        )
    plans = [plan]
    if plan.old_size is not None and 0.7 < h * w / math.prod(plan.old_size) < 1.4 and plan.new_size != plan.old_size:
        # there may be as many tokens as before, at other places: whoever counts them is found at another size
        plans += [
            _plan(root, request, plan.old_size, s, walk(root))[0]
            for s in nearest_valid(root, request, (2 * h, 2 * w), clean=False)[:1]
        ]
    try:
        failed = next(filter(None, (misfit(root, one, odd) for one in plans)), "")
    except CannotRun as why:
        text = (
            f"whether what is not of timm in it follows could not be tried, as it does not run on images alone: {why}"
        )
        return replace(plan, warnings=(*plan.warnings, text))
    if failed:
        raise UnsupportedModelError(
            f"{name}: img_size={plan.new_size} is not followed by {failed}. Put the layer that it stands for in its "
            "place for the resize, or write a handler with @timm_resize.register.",
            model=name,
        )
    return plan


def _plan(
    root: nn.Module, request: Request, old: Size | None, new: Size, modules: Walk
) -> tuple[ResizePlan, dict[str, nn.Module] | None]:
    """Return the plan, and the modules that a changed parameter is tied to, by path; None where it was tried."""
    handler, changes, asked = root_handler(root), dict[str, Change](), set[str]()
    for view in unwrap(root, modules):
        ctx = Context(root, request, old, new, view)
        for change in _changes(ctx, handler):
            changes.setdefault(change.key, change)
        asked |= ctx._asked
    changed = parameters(root, changes.values()).values()
    tied = tied_elsewhere(modules, changed, asked | changes.keys()) if changed else {}
    every = list(changes.values())
    for module in (ctx.root, *ctx.models):
        every += _bookkeeping(ctx, module, new)
    notes = (*ctx.notes, *memory_note(root, every))
    plan = ResizePlan(type(root).__name__, old, new, tuple(every), notes, tuple(ctx.warnings))
    return plan, None if _is_size_free(ctx, handler) else tied


def _changes(ctx: Context, handler: Handler | None) -> Iterator[Change]:
    asked = dict(ctx.request.options)
    if ctx.request.patch_size is not None:
        asked["patch_size"] = ctx.request.patch_size
    if asked:
        check_options(ctx.root, asked, _options(ctx.root, handler))
    if handler is not None:
        yield from ctx._run(handler, ctx.root)
    yield from ctx.visit_rest()
    if _is_size_free(ctx, handler):
        _check_size_free(ctx)


def _is_size_free(ctx: Context, handler: Handler | None) -> bool:
    """Whether no handler says what of a model depends on the size, so that it is tried as it is."""
    if handler is None:
        return not ctx._visited
    return handler.size is not None and not handler.state  # a model of a library that has handlers for others of it


def _options(root: nn.Module, handler: Handler | None) -> Sequence[str]:
    """Return the options of a model, and of those that one of another library holds."""
    if handler is None:
        return "window_size", "patch_size"
    inside = [handler_for(type(module)) for _, module in whole_models(root)[1:]]
    return sorted({option for h in (handler, *inside) if h is not None for option in h.options})


LARGE = 2048
"""Pixels along the shorter side at which a model without handlers is tried, beside the size asked for."""


def _check_size_free(ctx: Context) -> None:
    """Refuse a model without handlers that does not run, without values, at the new size and at a large one.

    At the large one it shows state of a size of its own, such as a table of positions that forward cuts to length.
    """
    (h, w), name = ctx.new_size, type(ctx.root).__name__
    times = -(-LARGE // min(h, w))
    asked = {**ctx.request.options, "patch_size": ctx.request.patch_size}
    try:
        if any(value is not None for value in asked.values()):
            failed = "no option but img_size is for it"
        else:
            failed = failure(ctx.root, (times * h, 2 * times * w))
    except CannotRun as why:
        failed = str(why)
    if failed:
        raise UnsupportedModelError(
            f"{name}: no handler for this class nor for any layer in it, and it does not take images of any size as it "
            f"is: {failed}. Let timm_resize.infer find what depends on the size, or write a handler with "
            "@timm_resize.register.",
            model=name,
        )
    if failed := failure(ctx.root, (h, w)):
        ctx.invalid(f"does not pass: {failed}")


def shapes_at(
    root: nn.Module, img_size: SizeLike | None = None, **options: Unpack[ResizeOptions]
) -> dict[str, tuple[int, ...] | None] | None:
    """Return the shapes of the tensors that change when `root` is constructed so, by name; None where it cannot be."""
    try:
        request = make_request(type(root).__name__, img_size, constructing=True, **options)
        size = request.img_size or current_size(root)
        assert size is not None
        ctx = Context(root, request, current_size(root), size)
        return {c.key: c.new for c in _changes(ctx, root_handler(root)) if c.kind != "attribute"}
    except (Invalid, ResizeError):
        return None


def _bookkeeping(ctx: Context, root: nn.Module, new: Size) -> list[Change]:
    """Record the size where stock timm's export and data config read it.

    As `timm.models._input.update_model_input_size` does; for a class whose constructor has no `img_size`, under a
    key of our own, since timm would export the other as a constructor argument.
    """
    handlers_record = ctx.model_args if root is not ctx.root or not ctx.models else {}
    handler = root_handler(root)
    if handler is not None and handler.size is not None:
        return []
    traits = dict(getattr(root, "_traits", {}))
    args = dict(getattr(root, "_model_args", {}))
    if takes_img_size(handler.cls if handler else type(root)):
        traits["img_size"] = new
        args.update(handlers_record, img_size=new)
        if ctx.request.patch_size is not None:
            args["patch_size"] = ctx.request.patch_size
    else:
        traits[TRAIT] = new
        args.update(handlers_record)
    out = []
    for name, value in (("_traits", traits), ("_model_args", args)):
        if name == "_model_args" and ctx.request.constructing:  # the factory records the arguments of the call
            if not ctx.built_args:
                continue
            value = {**getattr(root, "_model_args", {}), **ctx.built_args}
        old = root.__dict__.get(name, MISSING)
        if not same_value(old, value) and (value or old is not MISSING):
            out.append(Change(ctx.path(root), name, "attribute", old, value))
    return out


def _refused(root: nn.Module, request: Request, new: Size, reason: str) -> InvalidSizeError:
    name = type(root).__name__
    near = nearest_valid(root, request, new, clean=True) or nearest_valid(root, request, new, clean=False)
    names = " or ".join(short(s) if new[0] == new[1] else str(s) for s in sorted(near))
    advice = f"Use {names}." if near else "No valid size was found near it."
    text = f"{name}: img_size={new} {reason}. {advice}"
    return InvalidSizeError(text, model=name, argument="img_size", value=new, nearest=near)


def nearest_valid(root: nn.Module, request: Request, wanted: Size, clean: bool) -> list[Size]:
    """Search outward from `wanted` by planning: a size is valid when its plan can be made."""

    def valid(size: Size) -> bool:
        ctx = Context(root, request, current_size(root), size)
        try:
            for _ in _changes(ctx, root_handler(root)):
                pass
        except Invalid:
            return False
        return not (clean and ctx.warnings)

    if valid(wanted):
        return [wanted]
    if wanted[0] == wanted[1]:
        sizes = [(s, s) for s in _outward(wanted[0], lambda s: valid((s, s)))]
    else:  # axes are nearly always independent: find each on its own, then keep the pairs that work
        rows, columns = ((_outward(s, lambda v: valid((v, v)), keep=True)) for s in wanted)
        squares = [(side, side) for side in {*rows, *columns}]  # for models that take no others
        sizes = [(h, w) for h in rows for w in columns if valid((h, w))] or squares
    return sorted(sizes, key=lambda s: (abs(s[0] - wanted[0]) + abs(s[1] - wanted[1]), -s[0], -s[1]))[:2]


def _outward(start: int, valid: Callable[[int], bool], keep: bool = False, reach: int = 256) -> list[int]:
    """Return the nearest valid values below and above `start` (or `start` alone, if kept and valid)."""
    if keep and valid(start):
        return [start]
    below = next((s for s in range(start - 1, max(start - reach, 0), -1) if valid(s)), None)
    above = next((s for s in range(start + 1, start + reach + 1) if valid(s)), None)
    return [s for s in (below, above) if s is not None]
