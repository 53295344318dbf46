"""State dicts of one size into models of another."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import _helpers
from torch import Tensor, nn

from timm_resize.apply import adopt_, apply_plan
from timm_resize.errors import CheckpointError
from timm_resize.geometry import Size, parse_size
from timm_resize.graft import original
from timm_resize.history import recorded_size
from timm_resize.locate import current_size, find_model
from timm_resize.plan import ResizePlan
from timm_resize.planner import make_request, plan_request, shapes_at
from timm_resize.resample import Resample
from timm_resize.twins import planning_twin

_stock_load_checkpoint = original(getattr(_helpers, "load_checkpoint", None))


SQUARES = tuple(dict.fromkeys([
    *sorted({*range(32, 1025, 16), *range(28, 1037, 14)}), *range(24, 1033, 12), *range(1040, 2049, 16),
]))  # fmt: skip
"""Sides tried when a checkpoint fits no size on record: multiples of 16 and 14 px, then of 12 px, then large ones."""


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
    return fitted(state_dict, find_model(model), source=source, **options)[0]


def fitted(state_dict: Mapping[str, Any], root: nn.Module, *, source: Any = None, recorded: Size | None = None,
           **options: Any) -> tuple[dict[str, Any], ResizePlan | None]:  # fmt: skip
    """As `resize_state_dict`, with the plan that the tensors went through, None when they fit as they are.

    Args:
        state_dict: Likewise.
        root: The model itself.
        source: Likewise.
        recorded: The size that the checkpoint's file gives, tried first.
        **options: Likewise.
    """
    name, target = type(root).__name__, current_size(root)
    own, skipped = root.state_dict(), _classifiers(root)
    shapes = {k: tuple(v.shape) for k, v in own.items()}
    state_dict = without_geometry(without_wrappers(state_dict, own), root)
    if source is None:
        found = source_geometry(state_dict, root, recorded=recorded)
    else:
        found = {"img_size": parse_size(source, "source", name)}
    if found is None:
        _check_sizeless(shapes, state_dict, root)
        raise CheckpointError(
            f"{name}: the checkpoint fits neither the model's {target} nor any square size: "
            f"{_misfit(shapes, state_dict, skipped)}. Give source=(height, width), the image size it was saved at."
        )
    size = found.get("img_size", target)
    if size == target and "patch_size" not in found:
        return dict(state_dict), None
    misfit = None
    for constructing in (True, False):  # with the constructor's windows, or with windows scaled like the image
        twin = planning_twin(root)
        apply_plan(twin, plan_request(twin, make_request(name, **found, constructing=constructing)))
        if misfit := _misfit({k: tuple(v.shape) for k, v in twin.state_dict().items()}, state_dict, skipped):
            continue
        if "patch_size" in found:
            options = {"patch_size": patch_size(root), **options}
        plan = plan_request(twin, make_request(name, target, constructing=constructing, **options))
        check_finite(state_dict, plan)
        maps = {c.key: c.how for c in plan if isinstance(c.how, Resample)}
        out = {k: maps[k](v) if k in maps else v for k, v in state_dict.items()}
        # a persistent buffer is geometry: the model's own is the right one
        out.update({c.key: own[c.key] for c in plan if c.kind == "buffer" and c.key in out and c.key in own})
        if not (misfit := _misfit(shapes, out, skipped)):
            return out, plan
    raise CheckpointError(
        f"{name}: the checkpoint is not of source={size}: {misfit}. "
        "Give source=(height, width), the image size it was saved at."
    )


def _check_sizeless(shapes: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, Any], root: nn.Module) -> None:
    """Raise CheckpointError for a tensor of another shape that no image size explains."""
    sized = next((changed for s in SQUARES if (changed := shapes_at(root, img_size=(s, s)))), {})
    misfit = _misfit({k: v for k, v in shapes.items() if k not in sized}, state_dict, _classifiers(root))
    if misfit:
        raise _other_model(type(root).__name__, (), (), [misfit])


def without_wrappers(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state dict without the prefixes of modules that wrapped the model, as its own names are known.

    Of `DistributedDataParallel` and the EMA copies (`module.`), `torch.compile` (`_orig_mod.`) and programs that keep
    the model as `model.`; the averaged model's counter goes with its prefix.
    """
    probe = next(iter(own), "")
    for key in state_dict:
        prefix = key[: -len(probe)] if probe and key.endswith(probe) else ""
        if prefix and not (set(prefix.rstrip(".").split(".")) - {"module", "_orig_mod", "model"}):
            return {k.removeprefix(prefix): v for k, v in state_dict.items() if k != "n_averaged"}
    return state_dict


def without_geometry(state_dict: Mapping[str, Any], root: nn.Module) -> dict[str, Any]:
    """Return a state dict without what other programs save and the model computes from its geometry.

    Masks, indices, coordinate tables and caches of rotary embeddings: names of buffers that the model has, but that
    are not in its own state dict.
    """
    own = root.state_dict()
    buffers = {f"{path}.{n}" if path else n for path, module in root.named_modules() for n in module._buffers}
    return {k: v for k, v in state_dict.items() if k in own or k not in buffers}


def check_types(state_dict: Mapping[str, Any], root: nn.Module) -> None:
    """Raise CheckpointError where numbers of another kind would be cast silently: integers for floats, or reverse."""
    for key, tensor in root.state_dict().items():
        given = state_dict.get(key)
        if isinstance(given, Tensor) and given.is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{type(root).__name__}: {key} is {_dtype(given)}, not {_dtype(tensor)}. If the checkpoint is "
                "quantised, give the float one it was made from."
            )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_finite(state_dict: Mapping[str, Any], plan: ResizePlan) -> None:
    """Raise CheckpointError where a tensor that is going to be resampled holds NaN or infinity, which would spread."""
    for change in plan:
        tensor = state_dict.get(change.key) if isinstance(change.how, Resample) else None
        if tensor is not None and not tensor.is_meta and not tensor.isfinite().all():
            raise CheckpointError(
                f"{plan.model}: {change.key} holds values that are not finite, and resampling would spread them. "
                "Give a checkpoint from before the training diverged."
            )


def source_geometry(state_dict: Mapping[str, Any], root: nn.Module, *hints: Mapping[str, Any],
                    recorded: Size | None = None) -> dict[str, Any] | None:  # fmt: skip
    """Return the geometry (`img_size`, perhaps `patch_size`, `window_size`) whose tensor shapes `state_dict` has.

    Tried in this order: the size `recorded` in the file, the model's present geometry, `hints`, the size in
    `pretrained_cfg`, squares, each also with the patch size of the checkpoint's projection. Shapes alone cannot tell a
    14x14 grid from a 7x28 one: the sizes on record come first, and only squares are guessed.

    Returns:
        Keywords for `make_request`, empty for the present geometry; None when nothing fits.
    """
    shapes, skipped = {k: tuple(v.shape) for k, v in root.state_dict().items()}, _classifiers(root)
    first = [{"img_size": recorded}] if recorded is not None and recorded != current_size(root) else []
    if not first and _misfit(shapes, state_dict, skipped) is None:
        return {}
    config = (getattr(root, "pretrained_cfg", None) or {}).get("input_size") or ()
    squares = [{"img_size": (s, s)} for s in SQUARES]
    sizes = [*first, *([{}] if first else []), *hints, *([{"img_size": tuple(config[1:])}] if config else []), *squares]
    patch = _patch_of(state_dict, shapes)
    for options in [{**s, "patch_size": patch} for s in sizes] if patch else sizes:
        changed = shapes_at(root, **options)
        if changed is not None and _misfit({**shapes, **changed}, state_dict, skipped) is None:
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


def _misfit(shapes: Mapping[str, tuple[int, ...] | None], state_dict: Mapping[str, Any],
            skipped: tuple[str, ...]) -> str | None:  # fmt: skip
    """Return the first tensor whose shape differs, as text; None when all that both have agree, but `skipped` ones."""
    for key, tensor in state_dict.items():
        want = shapes.get(key)
        if (
            want is not None
            and isinstance(tensor, Tensor)
            and tuple(tensor.shape) != want
            and not key.startswith(skipped)
        ):
            return f"{key} is {tuple(tensor.shape)}, not {want}"
    return None


def _classifiers(root: nn.Module) -> tuple[str, ...]:
    """Return how names in a classifier begin, whose shapes say nothing of the image size."""
    names = (getattr(root, "pretrained_cfg", None) or {}).get("classifier") or ("head", "head_dist", "fc", "classifier")
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def load_checkpoint(model: nn.Module, checkpoint_path: str, use_ema: bool = True, device: Any = "cpu",
                    strict: bool = True, remap: bool = False, filter_fn: Any = None,
                    weights_only: bool = True) -> Any:  # fmt: skip
    """As `timm.models.load_checkpoint`, for a checkpoint of another image size too."""
    root, path = find_model(model), str(checkpoint_path)
    if remap or os.path.splitext(path)[-1].lower() in (".npz", ".npy"):
        return _stock_load_checkpoint(model, path, use_ema, device, strict, remap, filter_fn, weights_only)
    state_dict = _read(path, use_ema, device, weights_only)
    if filter_fn:
        state_dict = filter_fn(state_dict, model)
    tensors, plan = fitted(state_dict, root, recorded=recorded_size(path))
    _check_all(tensors, root, strict)
    keys = root.load_state_dict(tensors, strict=strict)
    adopt_(root, path, plan)
    return keys


def seam(model, checkpoint_path, use_ema=True, device="cpu", strict=True, remap=False, filter_fn=None,  # type: ignore
         weights_only=True):  # fmt: skip
    """Stand in for the body of `timm.models.load_checkpoint`."""
    from timm_resize.checkpoint import load_checkpoint

    return load_checkpoint(model, checkpoint_path, use_ema, device, strict, remap, filter_fn, weights_only)


def foreign(error: RuntimeError) -> RuntimeError:
    """Return what `load_state_dict` raised as a CheckpointError that names the first tensors; other errors as is."""
    said = " ".join(str(error).split())
    owner = re.search(r"loading state_dict for (\w+)", said)
    if owner is None:
        return error
    listed = (re.search(rf'{title} key\(s\) in state_dict: ((?:"[^"]+"(?:, )?)+)', said)
              for title in ("Missing", "Unexpected"))  # fmt: skip
    missing, unexpected = (re.findall(r'"([^"]+)"', keys[1]) if keys else [] for keys in listed)
    sizes = re.findall(r"size mismatch for ([^:]+): .*?Size\(\[([^]]*)\]\).*?Size\(\[([^]]*)\]\)", said)
    return _other_model(
        owner[1], missing, unexpected, [f"{key} is ({have}), not ({want})" for key, have, want in sizes]
    )


def _other_model(
    owner: str, missing: Sequence[str], unexpected: Sequence[str], misfits: Sequence[str]
) -> CheckpointError:
    parts = [
        f"{text} {keys[0]}" + (f" and {len(keys) - 1} others" if len(keys) > 1 else "")
        for text, keys in (("it lacks", missing), ("the model has no", unexpected))
        if keys
    ]
    return CheckpointError(
        f"{owner}: the checkpoint is of another model: {'; '.join([*parts, *misfits[:1]])}. "
        "Build the model with the arguments that it was saved with (depth, num_classes …)."
    )


def _check_all(state_dict: Mapping[str, Any], root: nn.Module, strict: bool) -> None:
    """Raise CheckpointError before anything is loaded where `load_state_dict` would raise half-way."""
    own = root.state_dict()
    missing = [k for k in own if k not in state_dict] if strict else []
    unexpected = [k for k in state_dict if k not in own] if strict else []
    misfit = _misfit({k: tuple(v.shape) for k, v in own.items()}, state_dict, ())
    if missing or unexpected or misfit:
        raise _other_model(type(root).__name__, missing, unexpected, [misfit] if misfit else [])
    check_types(state_dict, root)


def _read(path: str, use_ema: bool, device: Any, weights_only: bool) -> Any:
    try:
        return _helpers.load_state_dict(path, use_ema, device=device, weights_only=weights_only)
    except OSError:  # not there, not readable
        raise
    except Exception as error:  # each format has errors of its own
        said = textwrap.shorten(str(error), 600, placeholder=" …")
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {said} Fetch or save it again.") from None
