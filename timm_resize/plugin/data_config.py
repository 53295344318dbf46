"""Preprocessing that follows a resize: `timm.data`'s configuration with the model's present size."""

from __future__ import annotations

import inspect
from typing import Any

import timm.utils.onnx  # noqa: F401  (that `found` finds it; needs no onnx)
from torch import nn

from timm_resize.core.find import current_size, find_model, whole_models
from timm_resize.errors import ResizeError
from timm_resize.plugin.patch import calling, found, stock

INPUT_CONFIG = "timm.data.model_config.resolve_input_data_config"


def data_config(model: nn.Module, **args: Any) -> dict[str, Any]:
    """Return the preprocessing for a model at its present size, for `timm.data.create_transform`.

    Args:
        model: A timm model, or something that holds exactly one.
        **args: What `timm.data.resolve_data_config` takes in `args`, overriding the model's: `mean`, `crop_pct` ….

    Returns:
        input_size (channels, H, W), interpolation, mean, std, crop_pct, crop_mode.

    Example:
        >>> import timm, timm_resize
        >>> model = timm_resize.create_model("resnet18", img_size=(192, 256))
        >>> timm_resize.data_config(model)["input_size"]
        (3, 192, 256)
    """
    root = find_model(model)
    channels = (getattr(root, "pretrained_cfg", None) or {}).get("input_size", (3,))[0]
    size = current_size(root)
    if size is not None and args.get("img_size") is None:
        args = {"input_size": (args.get("in_chans") or args.get("chans") or channels, *size), **args}
    timms = next((model for _, model in whole_models(root) if getattr(model, "pretrained_cfg", None)), root)
    return stock("timm.data.config.resolve_data_config")(args, None, timms)


def resolve_data_config(
    args: Any = None, pretrained_cfg: Any = None, model: Any = None, use_test_size: bool = False, verbose: bool = False
) -> dict[str, Any]:
    """As `timm.data.resolve_data_config`, with the present size of a resized model."""
    own = getattr(model, "pretrained_cfg", None)
    if args is not None and args is own:  # spelled so in many guides, and no request for the source's size
        args = {}
    size = _resized(model)
    asked = args or {}
    if size is not None and asked.get("input_size") is None and asked.get("img_size") is None:
        channels = next((asked[k] for k in ("in_chans", "chans") if asked.get(k) is not None), None)
        config = pretrained_cfg or own or {}
        channels = channels or (config.get("input_size") or (3,))[0]
        args = {**asked, "input_size": (channels, *size)}
    return stock("timm.data.config.resolve_data_config")(args, pretrained_cfg, model, use_test_size, verbose)


def resolve_input_data_config(
    model: Any, args: Any = None, pretrained_cfg: Any = None, use_test_size: bool = False, verbose: bool = False
) -> dict[str, Any]:
    """As `timm.data.resolve_input_data_config`, with the present size of a resized model as the one that it takes."""
    resolve, size = stock(INPUT_CONFIG), _resized(model)
    if size is not None:
        current = stock("timm.models._input.get_model_input_config")
        replaced = found("timm.models._input.get_model_input_config")
        resolve = calling(
            resolve, {replaced: lambda m: {**(c := current(m)), "input_size": (c["input_size"][0], *size)}}
        )
        asked = args or {}
        if all(asked.get(key) is None for key in ("input_size", "img_size")):
            args = {**asked, "img_size": (asked.get("model_kwargs") or {}).get("img_size") or size}
    return resolve(model, args, pretrained_cfg, use_test_size, verbose)


def onnx_export(*args: Any, **kwargs: Any) -> None:
    """As `timm.utils.onnx_export`, whose example image is of the model's present size where none is given."""
    export = stock("timm.utils.onnx.onnx_export")
    given = inspect.signature(export).bind(*args, **kwargs).arguments
    size = _resized(given["model"])
    if given.get("input_size"):
        given["input_size"] = tuple(given["input_size"])  # stock takes no list, which is what its script gives
    elif given.get("example_input") is None and size is not None:
        given["input_size"] = (_channels(given["model"]), *size)
    export(**given)


def _channels(model: nn.Module) -> int:
    """Return the channels of a model's images."""
    return getattr(find_model(model), "in_chans", 3)


def _resized(model: Any) -> Any:
    """Return the size of a model, whoever built or resized it; None where that is the source checkpoint's."""
    if not isinstance(model, nn.Module):
        return None
    try:
        root = find_model(model)
    except ResizeError:  # distributed, scripted: the model inside knows its size, but not as one of ours
        return None
    size, config = current_size(root), getattr(root, "pretrained_cfg", None) or {}
    return None if size == tuple((config.get("input_size") or (0, 0, 0))[1:]) else size
