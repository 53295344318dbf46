"""Any other model of the library: right, or refused."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import handler_for, register
from timm_resize.errors import UnsupportedModelError
from timm_resize.handlers.libraries.transformers.configs import image_size, plan_model, resized


@register(PreTrainedModel, sizes="any that its forward takes, where nothing in it depends on the size", size=image_size)
def plan_any(model: PreTrainedModel, ctx: Context) -> Changes:
    """Let a model through in which nothing has a size, which is tried by a run without values afterwards.

    A model that holds one of those with a handler may read a size that no handler knows, such as the number of tokens
    that stand for an image in a text. Where a configuration has an image size, a new model of the changed one must
    have the same tensors: it would be opened with it.
    """
    name = type(model).__name__
    for module in ctx.root.modules():
        handler = None if module is model else handler_for(type(module))
        if handler is not None and handler.state:
            raise UnsupportedModelError(
                f"{name}: {ctx.path(module)} depends on the image size, and what else in a {name} does is not known. "
                "Write a handler for it with @timm_resize.register.",
                model=name,
            )
    yield from plan_model(model, ctx)
    if image_size(model) is not None and (misfit := _other_tensor(model, ctx)):
        raise UnsupportedModelError(
            f"{name}: no handler for this class, and {misfit} depends on config.image_size. Write one with "
            "@timm_resize.register.",
            model=name,
        )


def _other_tensor(model: PreTrainedModel, ctx: Context) -> str:
    """Return the first tensor that a new model of the changed configuration has in another shape, '' for none."""
    config = resized(model.config, ctx.new_size)
    try:
        with torch.device("meta"):
            fresh = type(model)(config)
    except Exception as error:  # the code of anybody
        return f"whether it can be made again ({type(error).__name__}: {error})"
    shapes = {key: tensor.shape for key, tensor in fresh.state_dict().items()}
    return next((k for k, t in model.state_dict().items() if shapes.get(k, t.shape) != t.shape), "")
