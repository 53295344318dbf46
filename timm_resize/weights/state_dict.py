"""State dicts of one size into models of another."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from timm_resize.core.apply import apply_plan
from timm_resize.core.copies import planning_copy
from timm_resize.core.find import current_size, find_model, whole_models
from timm_resize.core.plan import ResizePlan
from timm_resize.core.planner import plan_to
from timm_resize.core.request import ResizeOptions
from timm_resize.errors import CheckpointError
from timm_resize.geometry import Size, SizeLike, parse_size
from timm_resize.resample import Resample
from timm_resize.weights.names import by_own_names, path_in
from timm_resize.weights.source import (
    checkpoint_geometry,
    classifier_prefixes,
    other_model_error,
    patch_size,
    shape_mismatch,
    sized_tensors,
    windows_of,
)


def resize_state_dict(
    state_dict: dict[str, Tensor], model: nn.Module, *, source: SizeLike | None = None, **options: Unpack[ResizeOptions]
) -> dict[str, Tensor]:
    """Fit a checkpoint saved at one image size to a model at another.

    Args:
        state_dict: Tensors by the names of `model`, or of anything else that holds such a timm model. Not changed.
        model: The model that will load them, at its own size, or something that holds exactly one.
        source: Image size (H, W) of the checkpoint. By default the size on record that the tensors' shapes fit
            (the model's, its `pretrained_cfg`'s), else the square one that they fit.
        **options: As for `plan_resize`.

    Returns:
        A new dict under the names that came in, but without the parts that wrappers (`torch.compile`, DDP, averages …)
        added and `model` has not; what does not depend on the size, or is not of the timm model, is the same object.
        Files of other programs that stock's filters rename get the names of `model`.

    Raises:
        CheckpointError: Nothing of the model is there, or the tensors fit no size that is known; give `source`.

    Example:
        >>> import timm, timm_resize
        >>> small = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=1)
        >>> large = timm.create_model("vit_tiny_patch16_224", img_size=160, depth=1)
        >>> large.load_state_dict(timm_resize.resize_state_dict(small.state_dict(), large))
        <All keys matched successfully>
    """
    refusals = list[CheckpointError]()
    for _, root in whole_models(find_model(model)):  # the file may be of a model that this one holds
        path = path_in(model, root)
        try:
            names, tensors = by_own_names(state_dict, root, path)
        except CheckpointError as refusal:
            refusals.append(refusal)
        else:
            tensors = fitted(tensors, root, source=source, **options)[0]
            return names.put_back(tensors, state_dict, path, held=model.state_dict(keep_vars=True))
    raise refusals[0]


def fitted(
    tensors: Mapping[str, Tensor],
    root: nn.Module,
    *,
    source: SizeLike | None = None,
    recorded: Size | None = None,
    keyword: str = "source",
    **options: Unpack[ResizeOptions],
) -> tuple[dict[str, Tensor], ResizePlan | None]:
    """Fit tensors to a model; return them and the plan that they went through, None when they fit as they are.

    Args:
        tensors: By the model's own names.
        root: The model.
        source: As for `resize_state_dict`.
        recorded: The size that the checkpoint's file gives, tried first.
        keyword: What the caller calls `source`, for the messages.
        **options: As for `plan_resize`.

    Raises:
        CheckpointError: The tensors fit no size that is known, or not the one that is given or recorded.
    """
    name, target = type(root).__name__, current_size(root)
    own, skipped = root.state_dict(keep_vars=True), classifier_prefixes(root)
    shapes = {k: tuple(v.shape) for k, v in own.items()}
    given = None if source is None else parse_size(source, keyword, name)
    found = checkpoint_geometry(tensors, root, given, recorded, keyword)
    own_size = found.get("img_size", target) == target and "patch_size" not in found
    if own_size and shape_mismatch(shapes, tensors, skipped) is None:
        return dict(tensors), None
    misfit = None
    if "patch_size" in found:
        options = {"patch_size": patch_size(root), **options}
    if "window_size" in found:
        options = {"window_size": windows_of(own, root), **options}
    for constructing in (True, False):  # with the constructor's windows, or with windows scaled like the image
        there = planning_copy(root)
        apply_plan(there, plan_to(there, **found, constructing=constructing))
        if misfit := shape_mismatch(
            {k: tuple(v.shape) for k, v in there.state_dict(keep_vars=True).items()}, tensors, skipped
        ):
            continue
        plan = plan_to(there, target, constructing=constructing, **options)
        check_finite(tensors, plan)
        maps = {c.key: c.how for c in plan if isinstance(c.how, Resample)}
        out = {k: maps[k](v) if k in maps else v for k, v in tensors.items()}
        # what is rebuilt, a persistent buffer, is geometry: the model's own is the right one
        rebuilt = {c.key for c in plan.tensors if c.key not in maps}
        out.update({key: own[key] for key in rebuilt if key in out and key in own})
        if not (misfit := shape_mismatch(shapes, out, skipped)):
            return out, plan
    raise CheckpointError(
        f"{name}: the checkpoint is not of {keyword}={found.get('img_size', target)}: {misfit}. "
        f"Give {keyword}=(height, width), the image size it was saved at."
    )


def _odd(value: object, like: Tensor) -> str:
    """Return what is wrong with a value that is to be copied into a tensor, '' for nothing."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.layout != torch.strided or (value.is_meta and not like.is_meta):
        return "is a sparse tensor" if value.layout != torch.strided else "has no values (meta device)"
    narrows = value.is_floating_point() and like.is_floating_point() and value.dtype.itemsize > like.dtype.itemsize
    if narrows and not value.is_meta and bool((value.isfinite() & ~value.to(like.dtype).isfinite()).any()):
        return f"holds numbers beyond {_dtype(like)}"
    return ""


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_finite(state_dict: Mapping[str, Tensor], plan: ResizePlan) -> None:
    """Raise CheckpointError where a tensor that is going to be resampled holds NaN or infinity, which would spread."""
    for change in plan:
        tensor = state_dict.get(change.key) if isinstance(change.how, Resample) else None
        if tensor is not None and not tensor.is_meta and not tensor.isfinite().all():
            raise CheckpointError(
                f"{plan.model}: {change.key} holds values that are not finite, and resampling would spread them. "
                "Give a checkpoint from before the training diverged."
            )


def check_fits(state_dict: Mapping[str, Tensor], root: nn.Module, strict: bool) -> None:
    """Raise CheckpointError before anything is loaded where a load would raise half-way, or cast to nonsense."""
    check_values(state_dict, root)
    own = root.state_dict(keep_vars=True)
    missing = [k for k in own if k not in state_dict] if strict else []
    unexpected = [k for k in state_dict if k not in own] if strict else []
    misfit = shape_mismatch({k: tuple(v.shape) for k, v in own.items()}, state_dict, ())
    if missing or unexpected or misfit:
        raise other_model_error(type(root).__name__, missing, unexpected, [misfit] if misfit else [])


def check_values(state_dict: Mapping[str, Tensor], root: nn.Module) -> None:
    """Raise CheckpointError for what stands in a tensor's place and cannot be copied into it without loss of sense.

    Integers for floats, or reverse, would be cast silently, and so would numbers beyond the model's type.
    """
    name = type(root).__name__
    for key, tensor in root.state_dict(keep_vars=True).items():
        given = state_dict.get(key, tensor)
        if odd := _odd(given, tensor):
            raise CheckpointError(f"{name}: {key} {odd}. Give a checkpoint that holds the values of its tensors.")
        if given.is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{name}: {key} is {_dtype(given)}, not {_dtype(tensor)}. If the checkpoint is quantised, give the "
                "float one it was made from."
            )


def check_covers(state_dict: Mapping[str, Tensor], root: nn.Module) -> None:
    """Raise CheckpointError where a checkpoint that need not hold everything lacks what it alone can give.

    What else it lacks is warned of.

    Stock loads without `strict` where the number of classes differs. A new classifier is then left as it was drawn, and
    so is a norm after a changed pool; a block, or a tensor that depends on the size, is not.
    """
    name, own = type(root).__name__, root.state_dict(keep_vars=True)
    missing = [key for key in own if key not in state_dict]
    if len(missing) == len(own):
        raise CheckpointError(
            f"{name}: the checkpoint has none of the model's tensors: its first is {next(iter(state_dict), None)!r}, "
            f"this one's {next(iter(own), None)!r}. Give a checkpoint of this architecture."
        )
    sized = sized_tensors(root)
    needed = [
        k for k in missing if k in sized or (re.search(r"\.\d+\.", k) and not k.startswith(classifier_prefixes(root)))
    ]
    if needed:
        raise other_model_error(name, needed, [], [])
    if missing:
        warnings.warn(f"{name}: not in the checkpoint, left as initialised: {', '.join(missing)}.", stacklevel=2)
