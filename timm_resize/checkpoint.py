"""State dicts of one size into models of another."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import _helpers
from torch import Tensor, nn

from timm_resize.apply import apply_plan
from timm_resize.errors import CheckpointError
from timm_resize.geometry import Size, parse_size
from timm_resize.locate import current_size, find_model
from timm_resize.planner import make_request, plan_request, shapes_at
from timm_resize.resample import Resample

_stock_load_checkpoint = _helpers.load_checkpoint


SQUARES = tuple(sorted({*range(32, 1025, 16), *range(28, 1037, 14)}))
"""Sides tried when a checkpoint fits no size that is on record: the multiples of 16 and of 14 px."""


def resize_state_dict(state_dict: dict[str, Tensor], model: nn.Module, *, source: Any = None,
                      **options: Any) -> dict[str, Tensor]:  # fmt: skip
    """Fit a checkpoint saved at one image size to a model at another.

    Args:
        state_dict: Tensors by timm's names. Not changed.
        model: The model that will load them, at its own size.
        source: Image size (H, W) of the checkpoint. By default the size on record that the tensors' shapes fit
            (the model's, its `pretrained_cfg`'s), else the square one that they fit.
        **options: As for `plan_resize`.

    Returns:
        A new dict; tensors that do not depend on the size are the same objects.

    Raises:
        CheckpointError: The tensors fit no size that is known; give `source`.

    Example:
        >>> import timm, timm_resize
        >>> small = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=1)
        >>> large = timm.create_model("vit_tiny_patch16_224", img_size=160, depth=1)
        >>> large.load_state_dict(timm_resize.resize_state_dict(small.state_dict(), large))
        <All keys matched successfully>
    """
    root = find_model(model)
    name, target = type(root).__name__, current_size(root)
    found = source_geometry(state_dict, root) if source is None else {"img_size": parse_size(source, "source", name)}
    if found is None:
        misfit = _misfit({k: tuple(v.shape) for k, v in root.state_dict().items()}, state_dict)
        raise CheckpointError(
            f"{name}: the checkpoint fits neither the model's {target} nor any square size: {misfit}. "
            "Give source=(height, width), the image size it was saved at."
        )
    size = found.get("img_size", target)
    if size == target and "patch_size" not in found:
        return dict(state_dict)
    shapes = {k: tuple(v.shape) for k, v in root.state_dict().items()}
    misfit = None
    for constructing in (True, False):  # with the constructor's windows, or with windows scaled like the image
        twin = meta_twin(root)
        apply_plan(twin, plan_request(twin, make_request(name, **found, constructing=constructing)))
        if misfit := _misfit({k: tuple(v.shape) for k, v in twin.state_dict().items()}, state_dict):
            continue
        if "patch_size" in found:
            options = {"patch_size": patch_size(root), **options}
        plan = plan_request(twin, make_request(name, target, constructing=constructing, **options))
        maps = {c.key: c.how for c in plan if isinstance(c.how, Resample)}
        out = {k: maps[k](v) if k in maps else v for k, v in state_dict.items()}
        own = root.state_dict()  # a persistent buffer is geometry: the model's own is the right one
        out.update({c.key: own[c.key] for c in plan if c.kind == "buffer" and c.key in out and c.key in own})
        if not (misfit := _misfit(shapes, out)):
            return out
    raise CheckpointError(
        f"{name}: the checkpoint is not of source={size}: {misfit}. "
        "Give source=(height, width), the image size it was saved at."
    )


def source_geometry(state_dict: Mapping[str, Any], root: nn.Module, *hints: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the geometry (`img_size`, perhaps `patch_size`, `window_size`) whose tensor shapes `state_dict` has.

    Tried in this order: the model's present geometry, `hints`, the size in `pretrained_cfg`, squares, each also
    with the patch size of the checkpoint's projection. Shapes alone cannot tell a 14x14 grid from a 7x28 one: the
    sizes on record come first, and only squares are guessed.

    Returns:
        Keywords for `make_request`, empty for the present geometry; None when nothing fits.
    """
    shapes = {k: tuple(v.shape) for k, v in root.state_dict().items()}
    if _misfit(shapes, state_dict) is None:
        return {}
    config = (getattr(root, "pretrained_cfg", None) or {}).get("input_size") or ()
    squares = [{"img_size": (s, s)} for s in SQUARES]
    sizes = [*hints, *([{"img_size": tuple(config[1:])}] if config else []), *squares]
    patch = _patch_of(state_dict, shapes)
    for options in [{**s, "patch_size": patch} for s in sizes] if patch else sizes:
        changed = shapes_at(root, **options)
        if changed is not None and _misfit({**shapes, **changed}, state_dict) is None:
            return dict(options)
    return None


def patch_size(root: nn.Module) -> Any:
    """Return the patch size of the model's patch embedding, None when it has none."""
    return getattr(getattr(root, "patch_embed", None) or getattr(root, "stem", None), "patch_size", None)


def _patch_of(state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Size | None:
    """Return the checkpoint's patch size where its patch projection has another kernel than the model's."""
    for key in ("patch_embed.proj.weight", "stem.proj.weight"):
        weight = state_dict.get(key)
        if isinstance(weight, Tensor) and weight.dim() == 4 and tuple(weight.shape[2:]) != shapes.get(key, ())[2:]:
            return int(weight.shape[2]), int(weight.shape[3])
    return None


def _misfit(shapes: Mapping[str, tuple[int, ...] | None], state_dict: Mapping[str, Any]) -> str | None:
    """Return the first tensor whose shape differs, as text; None when all that both have agree."""
    for key, tensor in state_dict.items():
        want = shapes.get(key)
        if want is not None and isinstance(tensor, Tensor) and tuple(tensor.shape) != want and not _head(key):
            return f"{key} is {tuple(tensor.shape)}, not {want}"
    return None


def _head(key: str) -> bool:
    """Whether a tensor belongs to a classifier, whose shape says nothing of the image size."""
    return key.startswith(("head.", "head_dist.", "fc.", "classifier."))


def meta_twin(model: nn.Module) -> nn.Module:
    """Copy a model's structure onto the meta device without copying its weights."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def load_checkpoint(model: nn.Module, checkpoint_path: str, use_ema: bool = True, device: Any = "cpu",
                    strict: bool = True, remap: bool = False, filter_fn: Any = None,
                    weights_only: bool = True) -> Any:  # fmt: skip
    """As `timm.models.load_checkpoint`, for a checkpoint of another image size too."""
    path = str(checkpoint_path)
    if remap or os.path.splitext(path)[-1].lower() in (".npz", ".npy"):
        return _stock_load_checkpoint(model, path, use_ema, device, strict, remap, filter_fn, weights_only)
    state_dict = _helpers.load_state_dict(path, use_ema, device=device, weights_only=weights_only)
    if filter_fn:
        state_dict = filter_fn(state_dict, model)
    return model.load_state_dict(resize_state_dict(state_dict, model), strict=strict)
