"""From a model and a request to a plan, and the sizes that a model can take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from timm_resize.context import Context, Invalid, Request, check_options
from timm_resize.errors import InvalidSizeError, ResizeError, UnsupportedModelError, near_names
from timm_resize.geometry import Size, parse_size
from timm_resize.locate import TRAIT, Walk, current_size, find_model, refuse_state, root_handler, walk
from timm_resize.memory import memory_note
from timm_resize.plan import MISSING, Change, ResizePlan, same_value
from timm_resize.registry import Handler
from timm_resize.resample.kinds import MODES

PRESETS: dict[str, dict[str, Any]] = {
    "timm": {"interpolation": "bicubic", "antialias": True},
    "deit": {"interpolation": "bicubic", "antialias": False},
    "big_vision": {"interpolation": "bilinear", "antialias": False},
}
"""What upstream code uses: timm's own; DeiT, transformers, mmpretrain; big_vision and the .npz loaders."""

POLICIES = ("timm", "keep", "scale")


def make_request(
    owner: str,
    img_size: Any = None,
    *,
    patch_size: Any = None,
    window_policy: str = "timm",
    interpolation: str | None = None,
    antialias: bool | None = None,
    preset: str | None = None,
    constructing: bool = False,
    **options: Any,
) -> Request:
    """Check what the caller gave, before any model is looked at.

    Raises:
        InvalidSizeError: `img_size` or `patch_size` is not a size.
        ResizeError: Unknown policy, preset or interpolation.
    """
    for name, value, known in (
        ("window_policy", window_policy, POLICIES),
        ("preset", preset, tuple(PRESETS)),
        ("interpolation", interpolation, (*MODES, "geometric")),
    ):
        if value is not None and value not in known:
            near = near_names(str(value), known) or ", ".join(known)
            raise ResizeError(f"{owner}: {name}={value!r} is not known. Use {near}.")
    chosen = dict(PRESETS[preset]) if preset else {}
    if interpolation not in (None, "geometric"):
        chosen["interpolation"] = interpolation
    return Request(
        img_size=None if img_size is None else parse_size(img_size, "img_size", owner),
        patch_size=None if patch_size is None else parse_size(patch_size, "patch_size", owner),
        window_policy=window_policy,
        mode=chosen.get("interpolation"),
        antialias=chosen.get("antialias") if antialias is None else bool(antialias),
        table_mode=interpolation or "geometric",
        constructing=constructing,
        options={k: v for k, v in options.items() if v is not None},
    )


def plan_resize(model: nn.Module, img_size: Any = None, **options: Any) -> ResizePlan:
    """Return what resizing `model` would change. Reads the model only; works on the meta device.

    Args:
        model: A timm model, or something that holds exactly one.
        img_size: New size in pixels, an int or (H, W); None keeps it (for a patch or window change).
        **options: `patch_size`; `window_size` (int, pair, or one per stage); `window_policy` ("timm": as stock's
            `set_input_size`, "keep", "scale"); `interpolation` ("bicubic", "bilinear", "nearest"), `antialias`,
            `preset` ("timm", "deit", "big_vision"); and what the model's stock `set_input_size` takes.

    Returns:
        The plan; empty when the model already has that size.

    Raises:
        InvalidSizeError: The size cannot work; the message names the nearest that can.
        UnsupportedModelError: No handler for the model, or its state cannot be resized.
        ResizeError: An option that this model does not have.

    Example:
        >>> import timm, timm_resize
        >>> model = timm.create_model("vit_tiny_patch16_224", device="meta")
        >>> print(timm_resize.plan_resize(model, (320, 448)))
        VisionTransformer: 224x224 -> 320x448
          pos_embed  parameter  1x197x192 -> 1x561x192  resampled: bicubic antialias
    """
    root = find_model(model)
    return plan_request(root, make_request(type(root).__name__, img_size, **options))


def plan_request(root: nn.Module, request: Request) -> ResizePlan:
    """Plan a checked request on a model that `find_model` returned."""
    name, old = type(root).__name__, current_size(root)
    new = request.img_size or old
    if new is None:
        raise InvalidSizeError(f"{name}: img_size=None and the model records no size. Use img_size=224.")
    if _nothing_asked(request) and new == old:
        return ResizePlan(name, old, new)
    modules = walk(root)
    refuse_state(root, modules)
    try:
        return _plan(root, request, old, new, modules)
    except Invalid as refusal:
        raise InvalidSizeError(_refusal(root, request, new, str(refusal))) from None


def _nothing_asked(request: Request) -> bool:
    return not request.constructing and request.patch_size is None and not request.options


def _plan(root: nn.Module, request: Request, old: Size | None, new: Size, modules: Walk) -> ResizePlan:
    handler = root_handler(root)
    ctx = Context(root, request, old, new, modules)
    changes = list(_changes(ctx, handler))
    if handler is None and not ctx._visited:
        raise UnsupportedModelError(
            f"{type(root).__name__}: no handler for this class nor for any layer in it. "
            "Write one with @timm_resize.register."
        )
    for module in (root, *ctx.models):
        changes += _bookkeeping(ctx, module, new)
    notes = (*ctx.notes, *memory_note(root, changes, new))
    return ResizePlan(type(root).__name__, old, new, tuple(changes), notes, tuple(ctx.warnings))


def _changes(ctx: Context, handler: Handler | None) -> Any:
    known = (handler.options if handler else ()) + ("window_size", "patch_size")
    check_options(ctx.root, ctx.request.options, handler.options if handler else known)
    if ctx.request.patch_size is not None and handler and "patch_size" not in handler.options:
        check_options(ctx.root, {"patch_size": ctx.request.patch_size}, handler.options)
    if handler is not None:
        yield from handler.plan(ctx.root, ctx)
    yield from ctx.visit_rest()


def shapes_at(root: nn.Module, **options: Any) -> dict[str, tuple[int, ...] | None] | None:
    """Return the shapes of the tensors that change when `root` is constructed so, by name; None where it cannot be."""
    try:
        request = make_request(type(root).__name__, constructing=True, **options)
        size = request.img_size or current_size(root)
        assert size is not None
        ctx = Context(root, request, current_size(root), size)
        return {c.key: c.new for c in _changes(ctx, root_handler(root)) if c.kind != "attribute"}
    except (Invalid, ResizeError):
        return None


def _takes_img_size(cls: type) -> bool:
    """Whether the class's constructor has `img_size`."""
    return "img_size" in inspect.signature(cls).parameters


takes_img_size: Callable[[type], bool] = functools.cache(_takes_img_size)


def _bookkeeping(ctx: Context, root: nn.Module, new: Size) -> list[Change]:
    """Record the size where stock timm's export and data config read it.

    As `timm.models._input.update_model_input_size` does; for a class whose constructor has no `img_size`, under a
    key of our own, since timm would export the other as a constructor argument.
    """
    handlers_record = ctx.model_args if root is not ctx.root or not ctx.models else {}
    traits = dict(getattr(root, "_traits", {}))
    args = dict(getattr(root, "_model_args", {}))
    handler = root_handler(root)
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


def nearest_sizes(model: nn.Module, img_size: Any, **options: Any) -> list[Size]:
    """Return the valid sizes around a request: itself if it is valid, else the nearest below and above.

    A size that works only by dropping pixels is not counted as valid here.

    Args:
        model: A timm model.
        img_size: An int or (H, W).
        **options: As for `plan_resize`.

    Returns:
        (H, W) pairs, nearest first; for a square request, squares. Empty when none was found.

    Example:
        >>> import timm, timm_resize
        >>> timm_resize.nearest_sizes(timm.create_model("vit_tiny_patch16_224", device="meta"), 250)
        [(256, 256), (240, 240)]
    """
    root = find_model(model)
    request = make_request(type(root).__name__, img_size, **options)
    wanted = request.img_size or current_size(root)
    return [] if wanted is None else _nearest(root, request, wanted, clean=True)


def _refusal(root: nn.Module, request: Request, new: Size, reason: str) -> str:
    near = sorted(_nearest(root, request, new, clean=True) or _nearest(root, request, new, clean=False))
    names = " or ".join(str(s[0] if new[0] == new[1] and s[0] == s[1] else s) for s in near)
    advice = f"Use {names}." if near else "No valid size was found near it."
    return f"{type(root).__name__}: img_size={new} {reason}. {advice}"


def _nearest(root: nn.Module, request: Request, wanted: Size, clean: bool) -> list[Size]:
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
        sizes = [(h, w) for h in rows for w in columns if valid((h, w))]
    return sorted(sizes, key=lambda s: (abs(s[0] - wanted[0]) + abs(s[1] - wanted[1]), -s[0], -s[1]))[:2]


def _outward(start: int, valid: Callable[[int], bool], keep: bool = False, reach: int = 256) -> list[int]:
    """Return the nearest valid values below and above `start` (or `start` alone, if kept and valid)."""
    if keep and valid(start):
        return [start]
    below = next((s for s in range(start - 1, max(start - reach, 0), -1) if valid(s)), None)
    above = next((s for s in range(start + 1, start + reach + 1) if valid(s)), None)
    return [s for s in (below, above) if s is not None]
