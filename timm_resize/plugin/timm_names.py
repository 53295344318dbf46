"""What not every version of timm has, looked up in one place: stock's own where it is there."""

from __future__ import annotations

from typing import Any

from timm.models import _factory, parse_model_name, split_model_name_tag
from torch import nn


def resolve_model_source(
    model_name: str, pretrained_cfg: Any, arguments: dict[str, Any], cache_dir: Any
) -> tuple[str, Any, dict[str, Any]]:
    """Return the architecture that a name means, its pretrained configuration, and the model's arguments.

    Before 1.0.31 timm does this inside of `create_model`.
    """
    if hasattr(_factory, "_resolve_model_source"):
        resolved: tuple[str, Any, dict[str, Any]] = _factory._resolve_model_source(
            model_name, pretrained_cfg, arguments, cache_dir
        )
        return resolved
    source, rest = parse_model_name(model_name)
    if source == "hf-hub":
        config, name, saved = _factory.load_model_config_from_hf(rest, cache_dir=cache_dir)
    elif source == "local-dir":
        config, name, saved = _factory.load_model_config_from_path(rest)
    else:
        name, tag = split_model_name_tag(rest)
        return name, pretrained_cfg or tag or None, dict(arguments)
    return name, config, {**(saved or {}), **arguments}


def record_arguments(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Let a model tell what it was built with, as `create_model` of timm 1.0.31 does: a save asks for it."""
    if not hasattr(model, "_model_args"):
        model._model_args = {k: v for k, v in arguments.items() if k not in ("device", "dtype")}  # type: ignore[assignment]
