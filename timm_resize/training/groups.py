"""Which parameters a resize touched, for fine-tuning them at a rate of their own, or them alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from timm_resize.core import history
from timm_resize.core.find import find_model
from timm_resize.core.plan import ResizePlan


def resampled(model: nn.Module) -> dict[str, str]:
    """Return which parameters of a model a resize resampled since they were loaded, and how: name → method.

    For a model that `create_model(pretrained=True, img_size=...)` returned, or one resized since.

    Example:
        >>> import timm_resize
        >>> model = timm_resize.create_model("vit_tiny_patch16_224", depth=1)
        >>> plan = timm_resize.resize_(model, 96)
        >>> timm_resize.resampled(model)
        {'pos_embed': 'resampled: bicubic antialias'}
    """
    return history.resampled(find_model(model))


def _resized(model: nn.Module, plan: ResizePlan | None) -> set[int]:
    root = find_model(model)
    names = resampled(model) if plan is None else [c.key for c in plan if c.kind == "parameter"]
    return {id(root.get_parameter(name)) for name in names}


def param_groups(
    model: nn.Module, plan: ResizePlan | None = None, *, lr: float, resized_lr: float, **options: object
) -> list[dict[str, Any]]:
    """Split trainable parameters in two: those that a resize resampled, and the rest.

    Args:
        model: The resized model.
        plan: What `resize_` returned; None for all that was resampled since the weights were loaded.
        lr: Learning rate of the rest.
        resized_lr: Learning rate of the resampled ones.
        **options: For both groups, such as `weight_decay`.

    Returns:
        Groups for a `torch.optim.Optimizer`; none is empty.

    Example:
        >>> import timm, timm_resize
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> groups = timm_resize.param_groups(model, timm_resize.resize_(model, 96), lr=1e-4, resized_lr=1e-3)
        >>> [(len(g["params"]), g["lr"]) for g in groups]
        [(1, 0.001), (19, 0.0001)]
    """
    resized = _resized(model, plan)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = (
        {"params": [p for p in trained if id(p) in resized], "lr": resized_lr, **options},
        {"params": [p for p in trained if id(p) not in resized], "lr": lr, **options},
    )
    return [group for group in groups if group["params"]]


def freeze_unresized_(model: nn.Module, plan: ResizePlan | None = None) -> int:
    """Let gradients reach only the parameters that a resize resampled.

    Args:
        model: The resized model; `requires_grad` of all others becomes False.
        plan: What `resize_` returned; None for all that was resampled since the weights were loaded.

    Returns:
        How many parameters stay trainable.

    Example:
        >>> import timm, timm_resize
        >>> model = timm.create_model("levit_128s")
        >>> timm_resize.freeze_unresized_(model, timm_resize.resize_(model, 256))
        7
    """
    resized = _resized(model, plan)
    for param in model.parameters():
        param.requires_grad_(param.requires_grad and id(param) in resized)
    return sum(p.requires_grad for p in model.parameters())
