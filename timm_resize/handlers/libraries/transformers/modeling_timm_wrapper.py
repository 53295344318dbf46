"""TimmWrapper: a timm model, whose constructor's arguments stand in the configuration as `model_args`."""

from __future__ import annotations

import json
from typing import Any

from torch import nn
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

from timm_resize.core.context import Changes, Context, current_size, find_model
from timm_resize.core.registry import handler_for, register, takes_img_size
from timm_resize.geometry import Size
from timm_resize.handlers.libraries.transformers.configs import plan_configs


def image_size(model: TimmWrapperPreTrainedModel) -> Size | None:
    """Return the size (H, W) of the timm model inside."""
    return current_size(find_model(model.get_submodule("timm_model")))


@register(
    TimmWrapperPreTrainedModel,
    state="that of the timm model inside; config.model_args, config.pretrained_cfg",
    method="as the timm model's",
    sizes="as the timm model's",
    size=image_size,
)
def plan_timm_wrapper(model: TimmWrapperPreTrainedModel, ctx: Context) -> Changes:
    """Resize the timm model, and write into the configuration what builds it at the size.

    `from_pretrained` gives `model_args` to `timm.create_model`, and TimmWrapperImageProcessor reads `pretrained_cfg`.
    """
    inner = find_model(model.get_submodule("timm_model"))
    yield from ctx.visit(inner)
    arguments = _arguments(inner, ctx)

    def write(config: Any) -> None:
        if arguments or config.model_args:
            config.model_args = {**(config.model_args or {}), **arguments}
        source = getattr(config, "pretrained_cfg", None)
        if source and source.get("input_size"):
            kept = {k: v for k, v in source.items() if k not in ("test_input_size", "test_pool_size")}
            config.pretrained_cfg = {**kept, "input_size": [source["input_size"][0], *ctx.new_size], "pool_size": None}

    yield from plan_configs(ctx, write)


def _arguments(inner: nn.Module, ctx: Context) -> dict[str, Any]:
    """Return the constructor's arguments that say the geometry, as JSON has them."""
    handler = handler_for(type(inner))
    given: dict[str, object] = dict(ctx.model_args)
    if takes_img_size(handler.cls if handler else type(inner)):
        given["img_size"] = ctx.new_size
        if ctx.request.patch_size is not None:
            given["patch_size"] = ctx.request.patch_size
    out: dict[str, Any] = json.loads(json.dumps(given))
    return out
