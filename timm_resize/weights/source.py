"""Which image size is a checkpoint of?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from timm_resize.core.find import current_size
from timm_resize.core.planner import shapes_at
from timm_resize.geometry import Size

SQUARES = tuple(
    dict.fromkeys([*sorted({*range(32, 1025, 16), *range(28, 1037, 14)}), *range(24, 1033, 12), *range(1040, 2049, 16)])
)
"""Sides tried when a checkpoint fits no size on record: multiples of 16 and 14 px, then of 12 px, then large ones."""


def source_geometry(
    state_dict: Mapping[str, Any], root: nn.Module, *hints: Mapping[str, Any], recorded: Size | None = None
) -> dict[str, Any] | None:
    """Return the geometry (`img_size`, perhaps `patch_size`, `window_size`) whose tensor shapes `state_dict` has.

    Tried in this order: the size `recorded` in the file, the model's present geometry, `hints`, the size in
    `pretrained_cfg`, squares, each also with the patch size of the checkpoint's projection. Shapes alone cannot tell a
    14x14 grid from a 7x28 one: the sizes on record come first, and only squares are guessed.

    Returns:
        Keywords for `make_request`, empty for the present geometry; None when nothing fits.
    """
    shapes, skipped = {k: tuple(v.shape) for k, v in root.state_dict().items()}, classifier_prefixes(root)
    first = [{"img_size": recorded}] if recorded is not None and recorded != current_size(root) else []
    if not first and shape_mismatch(shapes, state_dict, skipped) is None:
        return {}
    config = (getattr(root, "pretrained_cfg", None) or {}).get("input_size") or ()
    squares = [{"img_size": (s, s)} for s in SQUARES]
    sizes = [*first, *([{}] if first else []), *hints, *([{"img_size": tuple(config[1:])}] if config else []), *squares]
    patch = _patch_of(state_dict, shapes)
    for options in [{**s, "patch_size": patch} for s in sizes] if patch else sizes:
        changed = shapes_at(root, **options)
        if changed is not None and shape_mismatch({**shapes, **changed}, state_dict, skipped) is None:
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


def shape_mismatch(
    shapes: Mapping[str, tuple[int, ...] | None], state_dict: Mapping[str, Any], skipped: tuple[str, ...]
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


def classifier_prefixes(root: nn.Module) -> tuple[str, ...]:
    """Return how names in a classifier begin, whose shapes say nothing of the image size."""
    names = (getattr(root, "pretrained_cfg", None) or {}).get("classifier") or ("head", "head_dist", "fc", "classifier")
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
