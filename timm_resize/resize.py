"""Resize a model in memory: look at what would change, change it, for good or for a while, find the sizes that work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from torch import nn
from typing_extensions import Unpack

from timm_resize.core.apply import apply_plan
from timm_resize.core.find import current_size, find_model
from timm_resize.core.followers import Ema, Optimizers, check_optimizer, several
from timm_resize.core.hidden import parameters, refuse_shared
from timm_resize.core.history import touched
from timm_resize.core.plan import CACHE, ResizePlan
from timm_resize.core.planner import nearest_valid, plan_to
from timm_resize.core.request import ResizeOptions, make_request
from timm_resize.core.transaction import resizing, write_all
from timm_resize.core.values import model_writes
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, SizeLike


def resize_(
    model: nn.Module,
    img_size: SizeLike | ResizePlan | None = None,
    *,
    optimizer: Optimizers | None = None,
    ema: Ema | None = None,
    grad: Literal["clear", "resample"] = "clear",
    **options: Unpack[ResizeOptions],
) -> ResizePlan:
    """Resize `model` in place, and with it the optimizers and EMA copies given.

    Parameters keep their identity, dtype, device, `requires_grad` and memory format. Either everything is
    written or, on any error, nothing. Threads that resize one model take turns; while one does, no other may run the
    model or back-propagate through it, which nothing checks. To serve several sizes at once there is `MultiSize`.

    Args:
        model: A timm model, or something that holds exactly one.
        img_size: New size in pixels, an int or (H, W), or a plan that `plan_resize` made for this model.
        optimizer: One optimizer or several, whose state follows the weights.
        ema: One EMA copy of the model or several (ModelEmaV2/V3, AveragedModel, or a plain copy).
        grad: What becomes of pending gradients of tensors that change: "clear", or "resample" by the weight's map,
            for a resize in the midst of accumulation.
        **options: As for `plan_resize`.

    Returns:
        The plan that was applied; empty when there was nothing to do. Its notes name optimizer state that could not
        follow and starts afresh.

    Raises:
        InvalidSizeError: The size cannot work.
        StalePlanError: A given plan does not fit the model's present state.
        ResizeError: As `plan_resize`.

    Example:
        >>> import timm, timm_resize
        >>> model = timm.create_model("levit_128s")
        >>> plan = timm_resize.resize_(model, 256)
        >>> plan.new_size, len(plan.tensors)
        ((256, 256), 14)
    """
    root = find_model(model)
    name = type(root).__name__
    if grad not in ("clear", "resample"):
        text = f"{name}: grad={grad!r} is not known. Use 'clear' or 'resample'."
        raise ResizeError(text, model=name, argument="grad", value=grad, nearest=("clear", "resample"))
    if isinstance(img_size, ResizePlan) and options:
        raise ResizeError(f"{name}: a plan takes no further options. Make the plan with them.", model=name)
    with resizing():
        plan = img_size if isinstance(img_size, ResizePlan) else plan_to(root, img_size, **options)
        own = {id(param) for param in root.parameters()}
        for one in several(optimizer):
            check_optimizer(one, own)
        refuse_shared(root, parameters(root, plan), several(optimizer))
        remarks = apply_plan(root, plan, optimizer=optimizer, ema=ema, options=options, outer=model, grad=grad)
    return replace(plan, notes=(*plan.notes, *remarks)) if remarks else plan


def plan_resize(model: nn.Module, img_size: SizeLike | None = None, **options: Unpack[ResizeOptions]) -> ResizePlan:
    """Return what resizing `model` would change. Reads the model only; works on the meta device.

    Args:
        model: A timm model, or something that holds exactly one.
        img_size: New size in pixels, an int or (H, W); None keeps it (for a patch or window change).
        **options: `patch_size`; `patch_resample` ("pinv" as stock, or "adjoint", better where the patch shrinks);
            `window_size` (int, pair, or one per stage); `window_policy` ("timm": as stock's
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
    return plan_to(find_model(model), img_size, **options)


@contextmanager
def at_size(model: nn.Module, img_size: SizeLike, **options: Unpack[ResizeOptions]) -> Iterator[ResizePlan]:
    """Resize a model for the length of a `with` block; yields the plan.

    Afterwards, also after an exception, every bit and attribute is as before. If the block trained a tensor that
    depends on the size, the model is resized back instead, which keeps what was learnt. As with `resize_`, no other
    thread may run the model or back-propagate through it meanwhile; `MultiSize` is for that.

    Args:
        model: A timm model, or something that holds exactly one.
        img_size: An int or (H, W) in pixels.
        **options: As for `plan_resize`.

    Raises:
        InvalidSizeError: The size cannot work; nothing has changed.

    Example:
        >>> import timm, timm_resize, torch
        >>> model = timm.create_model("resmlp_12_224").eval()
        >>> with timm_resize.at_size(model, 96):
        ...     model(torch.randn(1, 3, 96, 96)).shape
        torch.Size([1, 1000])
        >>> model.stem.img_size
        (224, 224)
    """
    root = find_model(model)
    size = current_size(root)
    with resizing():
        plan = plan_to(root, img_size, **options)
        refuse_shared(root, parameters(root, plan))
        undo = write_all(model_writes(root, plan, {}))
    try:
        yield plan
    finally:
        with resizing():
            if not touched(root) and current_size(root) == plan.new_size:
                undo()
                for change in plan:
                    if change.old is CACHE:  # of a weight that the block may have trained
                        root.get_submodule(change.path).__dict__[change.name] = {}
            elif size is not None:
                write_all(model_writes(root, plan_to(root, size), {}))


def nearest_sizes(model: nn.Module, img_size: SizeLike, **options: Unpack[ResizeOptions]) -> list[Size]:
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
    return [] if wanted is None else nearest_valid(root, request, wanted, clean=True)
