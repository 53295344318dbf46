"""Pretrained weights read at the checkpoint's own size, whatever size the model is wanted at."""

from __future__ import annotations

import functools
import pickle
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import _builder, get_pretrained_cfg
from torch import nn

from timm_resize.core.apply import apply_plan
from timm_resize.core.find import current_size, find_model, model_handler
from timm_resize.core.planner import plan_request
from timm_resize.core.request import make_request
from timm_resize.errors import CheckpointError
from timm_resize.geometry import Size
from timm_resize.weights.names import without_geometry
from timm_resize.weights.provenance import adopt_, checkpoint_file, recorded_size
from timm_resize.weights.source import source_geometry
from timm_resize.weights.state_dict import check_types, foreign

_stock_load_pretrained: Any = getattr(_builder, "load_pretrained", None)


_loads = {"now": 0}


_loads_lock = threading.Lock()


_local = threading.local()


def build_loaded(
    create_fn: Callable[..., nn.Module], wanted: dict[str, Any], saved: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with its weights at the checkpoint's size, and the geometry that is still to be set.

    Args:
        create_fn: Entry point of the architecture.
        wanted: Geometry that was asked for, `img_size` among it.
        saved: Geometry that the checkpoint's configuration gives.
        kwargs: Other arguments for `create_fn`.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is not of this model.
    """
    try:
        try:
            with _loading(wanted):
                model = create_fn(pretrained=True, **saved, **kwargs)
        except (AssertionError, TypeError, ValueError) as error:  # a size that stock's constructor does not express
            if not saved or isinstance(error, CheckpointError):
                raise
            with _loading(saved):
                model = create_fn(pretrained=True, **_native_size(create_fn), **kwargs)
    except CheckpointError:
        raise
    except RuntimeError as error:  # weights of another layout, which stock's filter fits to the geometry asked for
        with suppress(Exception):  # stock cannot either: the first error says what is wrong
            return create_fn(pretrained=True, **{**saved, **wanted}, **kwargs), {}
        raise _explained(error) from error
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise _explained(error) from error
    adopt_(find_model(model))
    return model, {k: v for k, v in wanted.items() if k != "img_size"}


def _native_size(create_fn: Any) -> dict[str, Any]:
    """Return the image size that an architecture has in stock timm, whatever the checkpoint's is."""
    while isinstance(create_fn, functools.partial):
        create_fn = create_fn.args[0]
    native = get_pretrained_cfg(create_fn.__name__, allow_unregistered=True)
    return {"img_size": native.input_size[1:]} if native is not None else {}


def from_jax(root: nn.Module) -> bool:
    """Whether a pretrained model's weights are an archive of JAX arrays, read by the model's own `load_pretrained`."""
    config = getattr(root, "pretrained_cfg", None)
    _, place = _builder._resolve_pretrained_source(config) if config else ("", "")
    name = place[-1] if isinstance(place, (list, tuple)) and place else place
    return isinstance(name, str) and name.endswith((".npz", ".npy"))


def _explained(error: Exception) -> Exception:
    """Return what a damaged or foreign checkpoint caused as a CheckpointError, anything else as it is."""
    if isinstance(error, RuntimeError) and not any(
        word in str(error) for word in ("PytorchStreamReader", "weights_only")
    ):
        return foreign(error)
    said = textwrap.shorten(str(error), 600, placeholder=" …")
    return CheckpointError(f"the checkpoint cannot be read: {said} Fetch it again.")


@contextmanager
def mapped() -> Iterator[None]:
    """Within, this thread builds models on the meta device, and what they load stays where it is.

    So the tensors of a safetensors file are read from its mapping when they are used. What no file holds has no values:
    buffers that are no part of a state dict, a new classifier.
    """
    with _loading(None), torch.device("meta"):
        _local.assign = True
        try:
            yield
        finally:
            _local.assign = False


@contextmanager
def _loading(target: dict[str, Any] | None) -> Iterator[None]:
    """Let this thread's `load_pretrained` first bring the model to the checkpoint's own size, if a target is given."""
    with _loads_lock:
        _loads["now"] += 1
        _builder.load_pretrained = _load_pretrained
    outer, _local.target = getattr(_local, "target", None), target
    try:
        yield
    finally:
        _local.target = outer
        with _loads_lock:
            _loads["now"] -= 1
            if not _loads["now"]:
                _builder.load_pretrained = _stock_load_pretrained


def _load_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """As timm's, for this thread's target."""
    target = getattr(_local, "target", None)
    if target is not None:
        kwargs["filter_fn"] = functools.partial(_filter_at_source, kwargs.get("filter_fn"), target)
    if not getattr(_local, "assign", False):
        _stock_load_pretrained(model, *args, **kwargs)
        return
    model.load_state_dict = functools.partial(model.load_state_dict, assign=True)  # type: ignore[method-assign]
    try:
        with torch.device("cpu"):  # what a filter makes is real
            _stock_load_pretrained(model, *args, **kwargs)
    finally:
        del model.load_state_dict


def _filter_at_source(filter_fn: Any, target: dict[str, Any], state_dict: Any, model: nn.Module) -> Any:
    """Resize the (still random) model to the checkpoint's size, so that stock's filter has nothing to interpolate."""
    root = find_model(model)
    found = None
    if model_handler(root) is not None:
        config = getattr(root, "pretrained_cfg", None) or {}
        path = checkpoint_file(config)
        found = source_geometry(state_dict, root, target, recorded=recorded_size(path) if path else None)
        if found:
            request = make_request(type(root).__name__, **found, constructing=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                apply_plan(root, plan_request(root, request))
    if filter_fn is not None:
        with _configured(root, current_size(root) if found else None):
            try:
                state_dict = filter_fn(state_dict, model)
            except TypeError:  # as stock: filters of one argument
                state_dict = filter_fn(state_dict)
    state_dict = without_geometry(state_dict, model)
    check_types(state_dict, model)
    return state_dict


@contextmanager
def _configured(root: nn.Module, size: Size | None) -> Iterator[None]:
    """Let a model's configuration give the size that its checkpoint was found to have: stock's filters look there."""
    config: Any = getattr(root, "pretrained_cfg", None)
    if size is None or not config or not config.get("input_size"):
        yield
        return
    root.pretrained_cfg = {**config, "input_size": (config["input_size"][0], *size)}  # type: ignore[assignment]
    try:
        yield
    finally:
        root.pretrained_cfg = config
