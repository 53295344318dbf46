"""`create_model` with `img_size` for every model, and the plugin that puts it into timm.

The body of `timm.create_model` looks three names up in its module at each call: `_resolve_model_source`,
`model_entrypoint` and `load_checkpoint`. Ours stand in for those three, either in timm's module (`install`)
or in a private copy of its namespace (`create_model` here), so a `create_model` imported earlier under any
name is reached, and both ways run timm's own code around ours. A fourth name, `load_pretrained` in timm's
builder, is replaced while a pretrained model is built at a size (`loading`); other threads' calls pass through it.

Weights that are read right after are not initialised first (`fast_init`): not while a pretrained model is built, and,
when there is a `checkpoint_path`, not before `load_checkpoint`, which is the next thing that `create_model` calls.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import config as _config
from timm.models import _builder, _factory, _features, _helpers, _hub, _registry
from torch import nn

from timm_resize.core.apply import apply_plan, guard_
from timm_resize.core.find import find_model, model_handler
from timm_resize.core.memory import LARGE, check_memory
from timm_resize.core.planner import plan_request
from timm_resize.core.registry import is_model_class
from timm_resize.core.request import make_request
from timm_resize.errors import ResizeError, UnsupportedModelError, near_names
from timm_resize.geometry import parse_size
from timm_resize.plugin import data_config as data
from timm_resize.plugin.patch import graft, ungraft
from timm_resize.resize import resize_
from timm_resize.weights import checkpoint, fast_init
from timm_resize.weights.checkpoint import load_checkpoint
from timm_resize.weights.pretrained import build_loaded, from_jax
from timm_resize.weights.provenance import adopt_
from timm_resize.weights.state_dict import check_finite


def unknown_model(error: RuntimeError, model_name: str) -> RuntimeError:
    """Add the nearest registered names to timm's 'Unknown model'; other errors stay as they are."""
    from timm.models import list_models

    near = near_names(model_name.partition(".")[0], list_models())
    if not str(error).startswith("Unknown model") or not near:
        return error
    return RuntimeError(f"{error}. Near names: {near}.")


OWN_OPTIONS = ("window_policy", "interpolation", "antialias", "preset")
"""Keywords of `create_model` that are ours alone; the model's constructor never sees them."""


GEOMETRY = (
    "img_size",
    "patch_size",
    "window_size",
    "transformer_window_size",
    "transformer_grid_size",
    "transformer_partition_ratio",
)
"""Constructor keywords that a pretrained build leaves at the checkpoint's values and a resize then sets."""


_stock_create_model = _factory.create_model


_SEAM_NAMES = ("_resolve_model_source", "model_entrypoint", "load_checkpoint")


_stock: dict[str, Any] = {name: getattr(_factory, name, None) for name in _SEAM_NAMES}


_RELIED_ON: tuple[tuple[types.ModuleType, tuple[str, ...]], ...] = (
    (_factory, _SEAM_NAMES),
    (_builder, ("load_pretrained", "_resolve_pretrained_source")),
    (_helpers, ("load_checkpoint", "load_state_dict", "_torch_load")),
    (_hub, ("save_config_for_hf", "hf_split")),
    (_registry, ("_model_to_module", "_module_to_models")),
    (_config, ("resolve_data_config",)),
)
"""Names of timm that are not part of its public interface, without which the plugin cannot work."""


@dataclass(frozen=True)
class _Pending:
    """One create_model call between resolving its source and building."""

    wanted: dict[str, Any]
    saved: dict[str, Any]
    own: dict[str, Any]


_local = threading.local()


def _resolve_model_source(model_name: str, pretrained_cfg: Any, kwargs: dict[str, Any], cache_dir: Any = None) -> Any:
    """Take the geometry out of a create_model call that asks for a size; other callers get timm's answer."""
    _local.pending, _local.defer = None, None
    frame = sys._getframe(1)
    if frame.f_code is not _stock_create_model.__code__:
        return _stock["_resolve_model_source"](model_name, pretrained_cfg, kwargs, cache_dir)
    own = {k: kwargs[k] for k in OWN_OPTIONS if k in kwargs}
    kwargs = {k: v for k, v in kwargs.items() if k not in own}
    if own and "img_size" not in kwargs:
        raise ResizeError(f"{model_name}: {next(iter(own))}= is about a change of size. Give img_size= too.")
    if "img_size" in kwargs:
        make_request(model_name, kwargs["img_size"], patch_size=kwargs.get("patch_size"), **own)
    wanted = {k: kwargs[k] for k in GEOMETRY if k in kwargs}
    try:
        name, cfg, merged = _stock["_resolve_model_source"](model_name, pretrained_cfg, kwargs, cache_dir)
    except RuntimeError as error:
        raise unknown_model(error, model_name) from None
    if "img_size" in wanted:
        saved = merged.get("pretrained_model_args") or {}
        _local.pending = _Pending(wanted, {k: saved[k] for k in GEOMETRY if k in saved}, own)
        merged = {k: v for k, v in merged.items() if k not in GEOMETRY}
    if _fast_init():
        loads = frame.f_globals["load_checkpoint"] is _load_checkpoint and bool(frame.f_locals["checkpoint_path"])
        _local.defer = functools.partial(fast_init.build, loads_after=loads)
    return name, cfg, merged


def _model_entrypoint(model_name: str, *args: Any, **kwargs: Any) -> Callable[..., nn.Module]:
    """Return timm's entry point, wrapped when create_model is going to read weights, or asks for a size."""
    create_fn = _stock["model_entrypoint"](model_name, *args, **kwargs)
    pending, _local.pending = getattr(_local, "pending", None), None
    defer, _local.defer = getattr(_local, "defer", None), None
    if pending is None:
        return functools.partial(_build_native, create_fn if defer is None else functools.partial(defer, create_fn))
    return functools.partial(_build_at, create_fn, pending, defer)


def _fast_init() -> bool:
    """Whether the call at hand leaves out initial values: as `create_model` was told, else as `install` was."""
    told = getattr(_local, "fast_init", None)
    return told if told is not None else all(_installed.told[-1:])


def _load_checkpoint(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """As `timm_resize.checkpoint.load_checkpoint`, also for a model whose initial values wait for it."""
    return fast_init.load_held(load_checkpoint, model, *args, **kwargs)


def _build_native(create_fn: Callable[..., nn.Module], **kwargs: Any) -> nn.Module:
    """Build as stock does; a model that would run silently wrong at another size gets its guard."""
    model = create_fn(**kwargs)
    root = find_model(model)
    if kwargs.get("pretrained"):
        adopt_(root)
    guard_(root)
    return model


def _build_at(
    create_fn: Callable[..., nn.Module],
    pending: _Pending,
    defer: Callable[..., nn.Module] | None,
    *,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build and resize; a model that is complete is resized as any other, after the deferral has ended."""
    if pretrained and defer is not None:
        create_fn = functools.partial(defer, create_fn)
    build = functools.partial(_build, create_fn, pending)
    return build(pretrained=pretrained, **kwargs) if pretrained or defer is None else defer(build, **kwargs)


def _build(
    create_fn: Callable[..., nn.Module], pending: _Pending, *, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """Build at the checkpoint's size, load, then resize; without weights, let stock draw them at the size."""
    _check_memory(create_fn, pending.saved if pretrained else {**pending.wanted, **pending.own}, kwargs)
    if pretrained:
        model, options = build_loaded(create_fn, pending.wanted, pending.saved, kwargs)
    else:
        model, options = _build_random(create_fn, pending, kwargs)
    img_size = pending.wanted["img_size"]
    root = find_model(model)
    if model_handler(root) is None and not pretrained and not options:
        return model  # stock took the size for a class that nobody taught us
    own = pending.own
    if pretrained and not own and from_jax(root):
        own = {"preset": "big_vision"}  # stock's loader of JAX archives interpolates so, not as its filters do
    request = make_request(type(root).__name__, img_size, constructing=True, **options, **own)
    plan = plan_request(root, request)
    if pretrained:
        check_finite(root.state_dict(), plan)
    apply_plan(root, plan, outer=model)
    handler = model_handler(root)
    named = inspect.signature(handler.cls if handler else type(root)).parameters
    recorded = {k: v for k, v in pending.wanted.items() if k in named}
    if recorded:
        model._model_args = {**getattr(model, "_model_args", {}), **recorded}  # type: ignore[assignment]
    _ensure_method(type(model))
    return model


def _check_memory(create_fn: Callable[..., nn.Module], geometry: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Raise InvalidSizeError before stock's constructor allocates more for a large image than there is."""
    size = parse_size(geometry["img_size"], "img_size", "create_model") if "img_size" in geometry else (0, 0)
    if max(size) <= LARGE:
        return
    with torch.device("meta"):
        root = find_model(create_fn(pretrained=False, **{**kwargs, "device": torch.device("meta")}))
    if model_handler(root) is not None:
        options = {k: v for k, v in geometry.items() if k != "img_size"}
        request = make_request(type(root).__name__, size, constructing=True, **options)
        check_memory(root, plan_request(root, request), torch.device(kwargs.get("device") or "cpu"))


def _build_random(create_fn: Callable[..., nn.Module], pending: _Pending, kwargs: dict[str, Any]) -> Any:
    """Return a randomly initialised model and the geometry that stock's constructor did not take."""
    state = torch.get_rng_state()
    if pending.own.get("window_policy", "timm") == "timm":  # others mean windows that stock's constructor has not
        try:
            return create_fn(pretrained=False, **pending.wanted, **kwargs), {}
        except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError, IndexError):
            torch.set_rng_state(state)
    options = {k: v for k, v in pending.wanted.items() if k != "img_size"}
    model = create_fn(pretrained=False, **kwargs)  # raises again what was not about the size
    if model_handler(find_model(model)) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: img_size={pending.wanted['img_size']!r} is refused by its constructor, and it "
            "has no handler. Write one with @timm_resize.register."
        )
    return model, options


_SEAM: dict[str, Any] = {
    "_resolve_model_source": _resolve_model_source,
    "model_entrypoint": _model_entrypoint,
    "load_checkpoint": _load_checkpoint,
}


_GRAFTS = (
    (getattr(_config, "resolve_data_config", None), data.seam),
    (getattr(_helpers, "load_checkpoint", None), checkpoint.seam),
)
"""Functions of timm that users call themselves, under names that they imported."""


def create_model(
    model_name: str, pretrained: bool = False, *, fast_init: bool | None = None, **kwargs: Any
) -> nn.Module:
    """Create a timm model at any image size, without touching timm.

    Args:
        model_name: As for `timm.create_model`: a name, `hf-hub:…` or `local-dir:…`.
        pretrained: Load weights; they are read at the checkpoint's size, then resized.
        fast_init: As for `install`, for this call; by default as installed, and on where nothing is installed.
        **kwargs: As for `timm.create_model`. With `img_size` also `patch_size`, `window_size`, `window_policy`,
            `interpolation`, `antialias` and `preset`, as for `plan_resize`.

    Returns:
        The model, with `set_input_size` on its class only if `install` is active.

    Raises:
        InvalidSizeError: The size cannot work for this model.
        RuntimeError: Unknown model, with near names.

    Example:
        >>> import timm_resize
        >>> model = timm_resize.create_model("resmlp_12_224", img_size=(256, 192), num_classes=10)
        >>> model.stem.grid_size
        (16, 12)
    """
    namespace = {**vars(_factory), **_SEAM}
    run = types.FunctionType(_stock_create_model.__code__, namespace, "create_model", _stock_create_model.__defaults__)
    run.__kwdefaults__ = _stock_create_model.__kwdefaults__
    outer, _local.fast_init = getattr(_local, "fast_init", None), fast_init
    try:
        return run(model_name, pretrained, **kwargs)
    finally:
        _local.fast_init = outer


class _Installed:
    """The plugin's state; `with install():` uninstalls at the end."""

    def __init__(self) -> None:
        self.depth = 0
        self.told: list[bool] = []  # fast_init of each install call
        self.lock = threading.RLock()
        self.classes: dict[type, Any] = {}

    def __enter__(self) -> _Installed:
        return self

    def __exit__(self, *_: object) -> None:
        uninstall()

    def uninstall(self) -> None:
        """Take the plugin out again, as `timm_resize.uninstall()`."""
        uninstall()


_installed = _Installed()


def install(*, fast_init: bool = True) -> _Installed:
    """Put the plugin into timm: `create_model` takes `img_size` for every model, all have `set_input_size`.

    Calls nest: as many `uninstall` calls take it out again. Safe from several threads.

    Args:
        fast_init: Do not initialise weights that a checkpoint is about to replace. The weights are those that stock
            loads, and a new head is drawn by its own initialisers; but fewer random numbers are drawn than by stock,
            so a seed gives other ones, there and afterwards. False draws all, as stock. The latest call holds.

    Returns:
        A handle; as a context manager it uninstalls at the end of the block.

    Raises:
        ResizeError: This timm lacks a name that we rely on; timm is untouched.

    Example:
        >>> import timm, timm_resize
        >>> with timm_resize.install():
        ...     model = timm.create_model("resnet18", img_size=256)
        ...     model.set_input_size((320, 448))
    """
    with _installed.lock:
        if _installed.depth == 0:
            _check_timm()
            for name, stock in _stock.items():
                if vars(_factory).get(name) is not stock:
                    raise ResizeError(f"timm: {_factory.__name__}.{name} was replaced by something else. Undo that.")
            for cls in _model_classes():
                _ensure_method(cls, force=True)
            for name, ours in _SEAM.items():
                setattr(_factory, name, ours)
            for function, scion in _GRAFTS:
                graft(function, scion)
        _installed.depth += 1
        _installed.told.append(fast_init)
    return _installed


def _check_timm() -> None:
    """Raise ResizeError where this timm is not one that the plugin can be put into."""
    gone = [f"{module.__name__}.{name}" for module, names in _RELIED_ON for name in names if not hasattr(module, name)]
    gone += [f"{name} in create_model" for name in _SEAM_NAMES if name not in _stock_create_model.__code__.co_names]
    if gone:
        raise ResizeError(
            f"timm {timm.__version__} has no {' and no '.join(gone)}, which timm_resize relies on. Use timm 1.0.31, or "
            "a newer timm_resize."
        )


def uninstall() -> None:
    """Take the plugin out of timm, which is then exactly as before; a no-op when it is not in."""
    with _installed.lock:
        _installed.depth = max(_installed.depth - 1, 0)
        del _installed.told[_installed.depth :]
        if _installed.depth == 0:
            for function, _ in _GRAFTS:
                ungraft(function)
            for name, stock in _stock.items():
                setattr(_factory, name, stock)
            for cls, method in _installed.classes.items():
                if method is None:
                    delattr(cls, "set_input_size")
                else:
                    setattr(cls, "set_input_size", method)  # noqa: B010
            _installed.classes.clear()


def _model_classes() -> list[type]:
    """Return timm's model classes and feature wrappers, base classes first."""
    found = {
        cls
        for name, module in list(sys.modules.items())
        if name.startswith("timm.models.") and module is not None
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and is_model_class(cls)
    }
    wrappers = [
        c
        for n, c in vars(_features).items()
        if n.startswith("Feature") and isinstance(c, type) and issubclass(c, nn.Module)
    ]
    from timm.models import FeatureGraphNet

    return sorted({*found, *wrappers, FeatureGraphNet}, key=lambda c: (len(c.__mro__), c.__qualname__))


def _ensure_method(cls: type, force: bool = False) -> None:
    """Give `cls` our `set_input_size` while the plugin is in; instances stay clean, so they pickle."""
    with _installed.lock:
        if (_installed.depth == 0 and not force) or getattr(cls, "set_input_size", None) in _ours:
            return
        stock = cls.__dict__.get("set_input_size")
        method = _method(getattr(cls, "set_input_size", None))
        _ours.add(method)
        _installed.classes[cls] = stock
        setattr(cls, "set_input_size", method)  # noqa: B010


_ours: set[Any] = set()


def _method(stock: Any) -> Callable[..., None]:
    """Return a `set_input_size` with the positional order of the stock one."""
    order = ["img_size", "patch_size", "window_size"]
    if stock is not None:
        order = [n for n in inspect.signature(stock).parameters if n != "self"]

    def set_input_size(self: nn.Module, *args: Any, **options: Any) -> None:
        """Resize the model in place; see `timm_resize.resize_`."""
        if len(args) > len(order):
            raise TypeError(f"set_input_size takes {', '.join(order)}; {len(args)} positional arguments were given")
        resize_(self, **dict(zip(order, args, strict=False)), **options)

    if stock is not None:
        set_input_size.__doc__ = stock.__doc__
    return set_input_size
