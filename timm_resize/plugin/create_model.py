"""`create_model` with `img_size` for every model: resolve the source, build at the checkpoint's size, load, resize."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import (
    _builder,
    _factory,
    get_pretrained_cfg,
    is_model,
    list_models,
    parse_model_name,
    split_model_name_tag,
)
from torch import nn

from timm_resize.builds.handler import entries_of
from timm_resize.builds.infer import infer_for
from timm_resize.core.apply import apply_plan, guard_
from timm_resize.core.find import current_size, find_model, model_handler
from timm_resize.core.memory import check_memory
from timm_resize.core.planner import plan_request, plan_to
from timm_resize.core.request import Interpolation, PatchResample, Preset, WindowPolicy, make_request
from timm_resize.errors import CheckpointError, ResizeError, UnsupportedModelError, near_names
from timm_resize.geometry import Size, SizeLike, parse_size
from timm_resize.plugin.patch import Function, calling, found, stock
from timm_resize.plugin.timm_names import record_arguments, resolve_model_source
from timm_resize.weights import fast_init as initial_values
from timm_resize.weights.checkpoint import load_checkpoint
from timm_resize.weights.pretrained import PretrainedLoader, from_jax
from timm_resize.weights.provenance import adopt_
from timm_resize.weights.state_dict import check_finite

OWN_OPTIONS = ("patch_resample", "window_policy", "interpolation", "antialias", "preset")
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
FACTORY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable", "exportable", "no_jit")
"""Keywords of `timm.create_model` that are not the model's."""

NOT_BUILT = (AssertionError, LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError)
"""What stock's constructors raise at a size that they do not expect, our errors among them."""

fast_init_settings: list[bool] = []
"""`fast_init` of every `install` that is in force, the latest last."""


def create_model(
    model_name: str,
    pretrained: bool = False,
    *,
    img_size: SizeLike | None = None,
    patch_size: SizeLike | None = None,
    patch_resample: PatchResample | None = None,
    window_size: SizeLike | Sequence[SizeLike] | None = None,
    window_policy: WindowPolicy | None = None,
    interpolation: Interpolation | None = None,
    antialias: bool | None = None,
    preset: Preset | None = None,
    source_size: SizeLike | None = None,
    fast_init: bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a timm model at any image size, without touching timm.

    Args:
        model_name: As for `timm.create_model`: a name, `hf-hub:…` or `local-dir:…`.
        pretrained: Load weights; they are read at the checkpoint's size, then resized.
        img_size: Image size in pixels, an int or (H, W); by default the architecture's own.
        patch_size: With `img_size` as for `plan_resize`, and so are `patch_resample`, `window_size`, `window_policy`,
            `interpolation`, `antialias` and `preset`; without it, this and `window_size` are stock's.
        source_size: Image size (H, W) that the weights were saved at; by default as recorded with them, or as their
            shapes tell.
        fast_init: As for `install`, for this call; by default as installed, and on where nothing is installed.
        **kwargs: As for `timm.create_model`.

    Returns:
        The model, with `set_input_size` on its class only if `install` is active.

    Raises:
        InvalidSizeError: The size cannot work for this model.
        CheckpointError: The weights cannot be read, or are not of this model.
        RuntimeError: Unknown model, with near names.

    Example:
        >>> import timm_resize
        >>> model = timm_resize.create_model("resmlp_12_224", img_size=(256, 192), num_classes=10)
        >>> model.stem.grid_size
        (16, 12)
    """
    given = None if source_size is None else parse_size(source_size, "source_size", model_name)
    skip = all(fast_init_settings[-1:]) if fast_init is None else fast_init
    asked = {
        "img_size": img_size,
        "patch_size": patch_size,
        "patch_resample": patch_resample,
        "window_size": window_size,
        "window_policy": window_policy,
        "interpolation": interpolation,
        "antialias": antialias,
        "preset": preset,
        **kwargs,
    }
    return _create(model_name, pretrained, given, skip, {k: v for k, v in asked.items() if v is not None})


def _create(
    model_name: str, pretrained: bool, source_size: Size | None, skip: bool, kwargs: dict[str, Any]
) -> nn.Module:
    """Resolve the source, build at the checkpoint's size, load, resize."""
    own = {k: kwargs.pop(k) for k in OWN_OPTIONS if k in kwargs}
    path = kwargs.pop("checkpoint_path", None)
    sized = "img_size" in kwargs
    if own and not sized:
        raise ResizeError(f"{model_name}: {next(iter(own))}= is about a change of size. Give img_size= too.")
    if source_size and not path and not (pretrained and sized):
        raise ResizeError(
            f"{model_name}: source_size= is about weights of another size. Give img_size= and the weights."
        )
    with ExitStack() as drawn_later:
        drawn_later.enter_context(initial_values.skipped(enabled=skip and bool(pretrained or path)))
        if not sized:
            try:
                model = _native(model_name, pretrained, kwargs)
            except NOT_BUILT:
                again = _at_saved_size(model_name, kwargs) if pretrained else None
                if again is None:
                    raise
                model = again
        else:
            wanted = {k: kwargs.pop(k) for k in GEOMETRY if k in kwargs}
            make_request(model_name, wanted["img_size"], patch_size=wanted.get("patch_size"), **own)
            source = Source.resolve(model_name, kwargs)
            _check_memory(source, source.saved if pretrained else {**wanted, **own})
            if pretrained:
                model, rest = _loaded(source, wanted, None if path else source_size)
                drawn_later.close()  # a complete model is resized as any other
            else:
                model, rest = _random(source, wanted, own)
            taken = not pretrained and not rest
            _teach(find_model(model), source, wanted if taken else {})
            _resize(model, wanted, rest, own, pretrained)
        if path:
            _load_checkpoint()(model, path, **({"source_size": source_size} if source_size else {}))
    return model


def _load_checkpoint() -> Function:
    """Return our `load_checkpoint`, called by whatever somebody put on the name that timm's factory calls."""
    fresh = functools.partial(load_checkpoint, undo=False)  # a model that nobody has yet
    return calling(_factory.load_checkpoint, {found("timm.models._helpers.load_checkpoint"): fresh})


@dataclass(frozen=True)
class Source:
    """What a model is built from, with the geometry taken out.

    Attributes:
        name: Registered name of the architecture.
        factory: Arguments of `timm.create_model` itself.
        arguments: Arguments of the model, those that its saved configuration gives among them.
        saved: Geometry that the saved configuration gives.
    """

    name: str
    factory: dict[str, Any]
    arguments: dict[str, Any]
    saved: dict[str, Any]

    @classmethod
    def resolve(cls, model_name: str, kwargs: dict[str, Any]) -> Source:
        """Let timm read the name's configuration, from a folder or the Hub too.

        Raises:
            RuntimeError: Unknown model, with near names.
        """
        factory = {k: v for k, v in kwargs.items() if k in FACTORY}
        arguments = {k: v for k, v in kwargs.items() if k not in FACTORY}
        check_known(model_name)
        name, config, arguments = resolve_model_source(
            model_name, factory.get("pretrained_cfg"), arguments, factory.get("cache_dir")
        )
        saved = {k: arguments.pop(k) for k in GEOMETRY if k in arguments}
        return cls(name, {**factory, "pretrained_cfg": config}, arguments, saved)

    def build(self, pretrained: bool, load: Function | None = None, **geometry: Any) -> nn.Module:
        """Run a copy of stock's own code, which calls `load`, if given, in place of timm's `load_pretrained`.

        Stock records in `model._model_args` what it is called with. The geometry goes by it, straight to the entry
        point: for a class that takes no `img_size` stock could not rebuild the model from that record.
        """

        def entrypoint(*args: Any) -> Function:
            entry = _factory.model_entrypoint(*args)
            if load is not None:
                entry = calling(entry, {_builder.load_pretrained: load})
            return functools.partial(entry, **geometry)

        create = calling(stock("timm.models._factory.create_model"), {_factory.model_entrypoint: entrypoint})
        model: nn.Module = create(self.name, pretrained, **self.factory, **self.arguments)
        record_arguments(model, self.arguments)
        return model


def check_known(model_name: str) -> None:
    """Raise RuntimeError for a name that is not registered, as timm does, with near names."""
    source, name = parse_model_name(model_name)
    if source is None and not is_model(base := split_model_name_tag(name)[0]):
        near = near_names(base, list_models())
        raise RuntimeError(f"Unknown model ({base})" + (f". Near names: {near}." if near else ""))


def _native(model_name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Build as stock does; a model that would run silently wrong at another size gets its guard.

    One that was saved gets all that its constructor makes wrong at the size that it was saved at.
    """
    check_known(model_name)
    model = stock("timm.models._factory.create_model")(model_name, pretrained, **kwargs)
    record_arguments(model, {k: v for k, v in kwargs.items() if k not in FACTORY})
    root = find_model(model)
    if pretrained:
        adopt_(root)
    if parse_model_name(model_name)[0] is not None and model_handler(root) is not None:
        with suppress(ResizeError):  # a configuration of the user's own that we know nothing of: as stock
            apply_plan(root, plan_to(root, current_size(root), constructing=True), outer=model)
    guard_(root)
    return model


def _at_saved_size(model_name: str, kwargs: dict[str, Any]) -> nn.Module | None:
    """Open a saved model whose size stock's constructor does not express; None where that is not what went wrong."""
    if parse_model_name(model_name)[0] is None:
        return None
    with suppress(*NOT_BUILT):
        config = Source.resolve(model_name, dict(kwargs)).factory["pretrained_cfg"]
        return _create(model_name, True, None, False, {**kwargs, "img_size": tuple(config["input_size"][1:])})
    return None


def open_at_own_size(model_name: str, *, source_size: SizeLike | None = None, **kwargs: Any) -> nn.Module:
    """Return a pretrained model at its checkpoint's own size, whose tensors stay in the mapped file where they can."""
    given = None if source_size is None else parse_size(source_size, "source_size", model_name)
    with initial_values.skipped():
        return _loaded(Source.resolve(model_name, kwargs), {}, given, assign=True)[0]


def _loaded(
    source: Source, wanted: dict[str, Any], source_size: Size | None, assign: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with its weights at the checkpoint's size, and the geometry that is still to be set.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is not of this model.
    """
    loader = PretrainedLoader(wanted, source_size, assign)
    try:
        try:
            model = source.build(True, loader, **source.saved)
        except NOT_BUILT:  # a size that stock's constructor does not express
            if not source.saved:
                raise
            loader = PretrainedLoader(source.saved, source_size, assign)
            model = source.build(True, loader, **_native_size(source.name))
    except CheckpointError:
        if (
            loader.misfit is not None and wanted
        ):  # weights of another layout, which stock's filter may fit to the size asked for
            with suppress(Exception):  # stock cannot either: the first error says what is wrong
                return source.build(True, **{**source.saved, **wanted}), {}
        raise
    adopt_(find_model(model))
    # as the architecture has them, but for what a folder says that it was saved with
    built = {"window_size": loader.windows, "patch_size": loader.patch} if wanted else {}
    kept = {k: v for k, v in built.items() if v is not None and k not in source.saved}
    return model, {**kept, **{k: v for k, v in wanted.items() if k != "img_size"}}


def _native_size(name: str) -> dict[str, Any]:
    """Return the image size that an architecture has in stock timm, whatever the checkpoint's is."""
    native = get_pretrained_cfg(name, allow_unregistered=True)
    return {"img_size": native.input_size[1:]} if native is not None else {}


def _random(source: Source, wanted: dict[str, Any], own: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a randomly initialised model and the geometry that stock's constructor did not take, all or none."""
    state = torch.get_rng_state()
    if own.get("window_policy", "timm") == "timm":  # others mean windows that stock's constructor has not
        try:
            model = source.build(False, **wanted)
            if all(parameter.numel() for parameter in model.parameters()):  # else of a map without a cell
                return model, {}
        except NOT_BUILT:
            if _takes(source, wanted):
                raise  # it was the memory, for one
        torch.set_rng_state(state)
    return source.build(False), wanted  # raises again what was not about the size


def _teach(root: nn.Module, source: Source, built: dict[str, Any]) -> None:
    """Find out by builds what of an architecture without a handler depends on the size; of a newer timm, or anybody's.

    Args:
        root: A model that was just built.
        source: What it was built from.
        built: Geometry that it was built with; empty where stock's constructor did not take what was asked for.

    Raises:
        UnsupportedModelError: That cannot be told, and the model is not of the size that was asked for.
    """
    geometry = {**source.saved, **{k: v for k, v in built.items() if k != "img_size"}}
    try:
        infer_for(root, lambda **size: source.build(False, **{**geometry, **size}))
    except ResizeError as error:
        if not built:
            raise UnsupportedModelError(f"{type(root).__name__} has no handler, and {error}") from error


def _resize(
    model: nn.Module, wanted: dict[str, Any], rest: dict[str, Any], own: dict[str, Any], pretrained: bool
) -> None:
    """Bring a model that was just built to the size asked for, and record the arguments that were given."""
    root = find_model(model)
    handler = model_handler(root)
    if not pretrained and not rest and (handler is None or entries_of(handler)):
        return  # stock took the size for a class that nobody taught us
    if pretrained and not own and from_jax(root):
        own = {"preset": "big_vision"}  # stock's loader of JAX archives interpolates so, not as its filters do
    request = make_request(type(root).__name__, constructing=True, **{**rest, "img_size": wanted["img_size"]}, **own)
    plan = plan_request(root, request)
    if pretrained:
        check_finite(root.state_dict(), plan)
    apply_plan(root, plan, outer=model)
    named = inspect.signature(handler.cls if handler else type(root)).parameters
    recorded = {k: v for k, v in wanted.items() if k in named}
    if recorded:
        model._model_args = {**getattr(model, "_model_args", {}), **recorded}  # type: ignore[assignment]


def _check_memory(source: Source, geometry: dict[str, Any]) -> None:
    """Raise InvalidSizeError before stock's constructor allocates more than there is.

    Up to twice the side that the architecture was made for, 16 times its largest table, it cannot.
    """
    if "img_size" not in geometry:
        return
    size = parse_size(geometry["img_size"], "img_size", "create_model")
    native = _native_size(source.name).get("img_size", (0,))
    if max(size) <= 2 * max(native) and not geometry.keys() - {"img_size", *OWN_OPTIONS}:
        return
    root = find_model(_without_memory(source, {}))
    if model_handler(root) is not None:
        options = {k: v for k, v in geometry.items() if k != "img_size"}
        request = make_request(type(root).__name__, size, constructing=True, **options)
        check_memory(root, plan_request(root, request), torch.device(source.arguments.get("device") or "cpu"))


def _takes(source: Source, geometry: dict[str, Any]) -> bool:
    """Whether stock's constructor takes a geometry, memory aside."""
    with suppress(*NOT_BUILT):
        return bool(_without_memory(source, geometry).state_dict())
    return False


def _without_memory(source: Source, geometry: dict[str, Any]) -> nn.Module:
    """Return what stock's constructor makes of a geometry on the meta device."""
    meta = torch.device("meta")
    with torch.random.fork_rng(devices=()), meta:
        try:
            return replace(source, arguments={**source.arguments, "device": meta}).build(False, **geometry)
        except TypeError:  # an architecture that is not timm's may not take it
            return source.build(False, **geometry)
