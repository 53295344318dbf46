"""Which image size is a checkpoint of?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from timm_resize.core.find import current_size, root_handler, whole_models
from timm_resize.core.plan import submodule
from timm_resize.core.planner import plan_to, shapes_at
from timm_resize.errors import CheckpointError
from timm_resize.geometry import Size, SizeLike, floor_div, parse_size

Geometry: TypeAlias = dict[str, Any]
"""Keywords of a resize: `img_size`, perhaps `patch_size` and `window_size`; none for the present ones."""

SQUARES = tuple(
    dict.fromkeys([*sorted({*range(32, 1025, 16), *range(28, 1037, 14)}), *range(24, 1033, 12), *range(1040, 2049, 16)])
)
"""Sides tried when a checkpoint fits no size on record: multiples of 16 and 14 px, then of 12 px, then large ones."""


def checkpoint_geometry(
    tensors: Mapping[str, object], root: nn.Module, given: Size | None, recorded: Size | None, keyword: str
) -> Geometry:
    """Return the geometry that a checkpoint is of: as given, as recorded, or as its shapes tell.

    Raises:
        CheckpointError: What is given contradicts what is recorded, or nothing that is known fits.
    """
    name, target = type(root).__name__, current_size(root)
    if given is not None:
        check_given(name, given, recorded, keyword)
        patch = patch_of(tensors, root)
        asked: Geometry = {"img_size": given, **({"patch_size": patch} if patch else {})}
        return _first_fitting([asked], tensors, root) or asked
    found = source_geometry(tensors, root, recorded=recorded)
    if found is not None:
        return found
    _check_sizeless(tensors, root)
    shapes = {k: tuple(v.shape) for k, v in root.state_dict(keep_vars=True).items()}
    kind = "square" if target is None or target[0] == target[1] else "recorded"
    raise CheckpointError(
        f"{name}: the checkpoint fits neither the model's {target} nor any {kind} size: "
        f"{shape_mismatch(shapes, tensors, classifier_prefixes(root))}. "
        f"Give {keyword}=(height, width), the image size it was saved at."
    )


def source_geometry(
    state_dict: Mapping[str, object], root: nn.Module, *hints: Geometry, recorded: Size | None = None
) -> Geometry | None:
    """Return the geometry (`img_size`, perhaps `patch_size`, `window_size`) whose tensor shapes `state_dict` has.

    Returns:
        Keywords for `make_request`, empty for the present geometry; None when nothing fits.
    """
    return _first_fitting(list(candidates(state_dict, root, *hints, recorded=recorded)), state_dict, root)


def _first_fitting(geometries: list[Geometry], state_dict: Mapping[str, object], root: nn.Module) -> Geometry | None:
    """Return the first geometry whose tensor shapes a checkpoint has, as it is or with the windows of its tables."""
    shapes, skipped = {k: tuple(v.shape) for k, v in root.state_dict(keep_vars=True).items()}, classifier_prefixes(root)
    for options in _with_windows(geometries, state_dict, root):
        changed = shapes_at(root, **options) if options else {}
        if changed is not None and shape_mismatch({**shapes, **changed}, state_dict, skipped) is None:
            return options
    return None


def _with_windows(options: list[Geometry], state_dict: Mapping[str, object], root: nn.Module) -> Iterator[Geometry]:
    """Yield geometries as they are, then each with the windows that the checkpoint's tables have."""
    yield from options
    handlers = (root_handler(model) for _, model in whole_models(root))
    if any(handler is not None and "window_size" in handler.options for handler in handlers):
        for each in options:
            size = parse_size(each["img_size"]) if "img_size" in each else None
            if windows := windows_of(state_dict, root, size):
                yield {**each, "window_size": windows}


_TABLE = re.compile(
    r"(?:.*\.)?(?:layers|stages)[._](\d+)\.blocks\.\d+\.attn\.(relative_position_bias_table|attention_biases)$"
)
"""Names of tables in models whose `window_size` is one per stage."""


def windows_of(tensors: Mapping[str, object], root: nn.Module, img_size: Size | None = None) -> tuple[Size, ...] | None:
    """Return each stage's window as the shapes of its bias tables tell it.

    A table is over ((2h-1)*(2w-1), heads) offsets, or (heads, h*h) absolute ones. Of the windows with as many, it is
    the model's present one, else a square one, as constructors make it, or one in proportion to the image, as resizes
    do. None where that leaves several or none, and for a model without such tables.
    """
    size, patch = img_size or current_size(root) or (1, 1), patch_size(root) or 1
    grid = floor_div(size, patch if isinstance(patch, int) else (patch[0], patch[1]))
    windows: dict[int, Size] = {}
    for key, tensor in tensors.items():
        found = _TABLE.match(key)
        if found is None or not isinstance(tensor, Tensor) or tensor.dim() != 2 or int(found[1]) in windows:
            continue
        sides = _offset_windows(tensor.shape[0])
        if found[2] == "attention_biases":
            sides = [(side, side) for side in (math.isqrt(tensor.shape[1]),) if side**2 == tensor.shape[1]]
        module = submodule(root, key.rpartition(".")[0])
        held = getattr(module, "window_size", getattr(module, "resolution", None))
        likely = [held] if held in sides else [s for s in sides if s[0] == s[1] or _in_proportion(s, grid)]
        if len(likely) != 1:
            return None
        windows[int(found[1])] = likely[0]
    return tuple(windows.get(i, (7, 7)) for i in range(max(windows) + 1)) if windows else None


def _offset_windows(count: int) -> list[Size]:
    """Return the windows (h, w) that have so many relative offsets."""
    rows = [side for side in range(1, count + 1, 2) if count % side == 0 and count // side % 2]
    return [((side + 1) // 2, (count // side + 1) // 2) for side in rows]


def _in_proportion(window: Size, grid: Size) -> bool:
    """Whether a window is some share of the grid, each side rounded down to whole cells, but at least one."""
    least = max(0 if side == 1 else side / cells for side, cells in zip(window, grid, strict=True))
    return least < min((side + 1) / cells for side, cells in zip(window, grid, strict=True))


def candidates(
    state_dict: Mapping[str, object], root: nn.Module, *hints: Geometry, recorded: Size | None = None
) -> Iterator[Geometry]:
    """Yield the geometries that a checkpoint may be of, the likeliest first.

    The size `recorded` in the file, the model's present geometry, `hints`, the size in `pretrained_cfg`; then squares,
    but for a model that is square itself only: shapes alone cannot tell a 14x14 grid from a 7x28 one. Each with the
    patch size of the checkpoint's projection, where that is another.
    """
    target, config = current_size(root), (getattr(root, "pretrained_cfg", None) or {}).get("input_size") or ()
    patch = patch_of(state_dict, root)
    first = [{"img_size": recorded}] if recorded is not None and recorded != target else []
    sizes = [*first, {}, *hints, *([{"img_size": tuple(config[1:])}] if config else [])]
    if target is None or target[0] == target[1]:
        sizes += [{"img_size": (s, s)} for s in SQUARES]
    for size in sizes:
        yield {**size, "patch_size": patch} if patch else dict(size)


def patch_size(root: nn.Module) -> SizeLike | None:
    """Return the patch size of the model's patch embedding, or of the model's in it, None when it has none."""
    models = [model for _, model in whole_models(root)]
    embeds = (getattr(model, "patch_embed", None) or getattr(model, "stem", None) for model in models)
    return next(filter(None, (getattr(embed, "patch_size", None) for embed in embeds)), None)


def patch_of(state_dict: Mapping[str, object], root: nn.Module) -> Size | None:
    """Return the checkpoint's patch size where its patch projection has another kernel than the model's."""
    own = root.state_dict(keep_vars=True)
    starts = [f"{path}." if path else "" for path, _ in whole_models(root)]
    for key in (start + name for start in starts for name in ("patch_embed.proj.weight", "stem.proj.weight")):
        weight = state_dict.get(key)
        if key in own and isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[2:] != own[key].shape[2:]:
            return int(weight.shape[2]), int(weight.shape[3])
    return None


def shape_mismatch(
    shapes: Mapping[str, tuple[int, ...] | None], state_dict: Mapping[str, object], skipped: tuple[str, ...]
) -> str | None:
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


CLASSIFIERS = ("head", "head_dist", "fc", "classifier", "heads")
"""Names of classifiers in models without a config that says theirs."""


def classifier_prefixes(root: nn.Module) -> tuple[str, ...]:
    """Return how names in a classifier begin, whose shapes say nothing of the image size."""
    names = (getattr(root, "pretrained_cfg", None) or {}).get("classifier") or CLASSIFIERS
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def check_given(owner: str, given: Size | None, recorded: Size | None, keyword: str = "source_size") -> None:
    """Raise CheckpointError where the size that a caller gives is not the one that the file records."""
    if given is not None and recorded is not None and given != recorded:
        raise CheckpointError(
            f"{owner}: {keyword}={given} is not the image size that the file records: {recorded}. Leave {keyword} out."
        )


def _check_sizeless(state_dict: Mapping[str, object], root: nn.Module) -> None:
    """Raise CheckpointError for a tensor of another shape that no image size explains.

    Raises:
        UnsupportedModelError: The model cannot be resized at all, pruned or wrapped as it is.
    """
    shapes = {k: tuple(v.shape) for k, v in root.state_dict(keep_vars=True).items()}
    sized = sized_tensors(root)
    if not sized:
        height, width = current_size(root) or (224, 224)
        plan_to(root, (2 * height, 2 * width))
    fixed = {k: v for k, v in shapes.items() if k not in sized and not _TABLE.match(k)}
    misfit = shape_mismatch(fixed, state_dict, classifier_prefixes(root))
    if misfit:
        raise other_model_error(type(root).__name__, (), (), [misfit])


def sized_tensors(root: nn.Module) -> Mapping[str, tuple[int, ...] | None]:
    """Return the shapes at another size of the tensors that depend on it, {} for a model that has none."""
    return next((changed for s in SQUARES if (changed := shapes_at(root, img_size=(s, s)))), {})


def other_model_error(
    owner: str, missing: Sequence[str], unexpected: Sequence[str], misfits: Sequence[str]
) -> CheckpointError:
    """Return the error for a checkpoint whose tensors are not those of the model `owner`."""
    parts = [
        f"{text} {keys[0]}" + (f" and {len(keys) - 1} others" if len(keys) > 1 else "")
        for text, keys in (("it lacks", missing), ("the model has no", unexpected))
        if keys
    ]
    return CheckpointError(
        f"{owner}: the checkpoint is of another model: {'; '.join([*parts, *misfits[:1]])}. "
        "Build the model with the arguments that it was saved with (depth, num_classes …)."
    )
