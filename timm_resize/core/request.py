"""What a caller asks for, checked before any model is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict

from torch import nn

from timm_resize.errors import ResizeError, near_names
from timm_resize.geometry import Size, SizeLike, parse_size
from timm_resize.resample.maps import MODES

WindowPolicy: TypeAlias = Literal["timm", "keep", "scale"]
Interpolation: TypeAlias = Literal["bicubic", "bilinear", "nearest", "geometric"]
Preset: TypeAlias = Literal["timm", "deit", "big_vision"]
PatchResample: TypeAlias = Literal["pinv", "adjoint"]


class ResizeOptions(TypedDict, total=False):
    """The keywords of a resize beside the image size: `patch_size` to `preset` for all, the rest of some families.

    A family of your own may take others; they pass at run time.

    Attributes:
        patch_size: New patch size, an int or (h, w).
        patch_resample: How the kernel of a patch that shrinks is made: "pinv" as stock, or "adjoint".
        window_policy: "timm": as stock's `set_input_size`; "keep"; "scale" with the image.
        interpolation: Of position embeddings, token mixing and bias tables; "geometric" is for the latter.
        antialias: Antialias it.
        preset: Interpolation and antialias as upstream code has them.
        window_size: Stock's, as all that follow: an int, (h, w), or one per stage.
    """

    patch_size: SizeLike | None
    patch_resample: PatchResample
    window_policy: WindowPolicy
    interpolation: Interpolation | None
    antialias: bool | None
    preset: Preset | None
    window_size: SizeLike | Sequence[SizeLike] | None
    window_ratio: int | None
    always_partition: bool | None
    grid_size: SizeLike | None
    partition_ratio: int | None
    transformer_window_size: SizeLike | None
    transformer_grid_size: SizeLike | None
    transformer_partition_ratio: int | None


@dataclass(frozen=True)
class Request:
    """What the caller asked for.

    Attributes:
        img_size: Wanted size, None to keep the current one (a patch or window change).
        patch_size: Wanted patch size, None to keep it.
        patch_resample: "pinv" or "adjoint".
        window_policy: "timm", "keep" or "scale".
        mode: Interpolation for position embeddings and token mixing, None for the family's.
        antialias: Antialias it (torch: also the other cubic kernel when it grows), None for the family's.
        table_mode: Interpolation of bias tables: "geometric" or one of `resample.MODES`, None for the family's.
        constructing: Aim for the structure of the constructor, not for that of `set_input_size`.
        options: Family keywords as given: window_size, window_ratio, always_partition ….
        copies: Parts of the model that were copied to run for shapes, with their copies, by the part's id.
    """

    img_size: Size | None = None
    patch_size: Size | None = None
    patch_resample: str = "pinv"
    window_policy: str = "timm"
    mode: str | None = None
    antialias: bool | None = None
    table_mode: str | None = None
    constructing: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    copies: dict[int, tuple[nn.Module, nn.Module]] = field(default_factory=dict, compare=False, repr=False)


PRESETS: dict[str, tuple[str, bool]] = {
    "timm": ("bicubic", True),
    "deit": ("bicubic", False),
    "big_vision": ("bilinear", False),
}
"""Interpolation and antialias of timm itself; of DeiT, transformers, mmpretrain; of big_vision and the .npz loaders."""

POLICIES = ("timm", "keep", "scale")

PATCH_MAPS = ("pinv", "adjoint")


def make_request(
    owner: str,
    img_size: SizeLike | None = None,
    *,
    patch_size: SizeLike | None = None,
    patch_resample: str = "pinv",
    window_policy: str = "timm",
    interpolation: str | None = None,
    antialias: bool | None = None,
    preset: str | None = None,
    constructing: bool = False,
    **options: Any,
) -> Request:
    """Check what the caller gave, before any model is looked at.

    Raises:
        InvalidSizeError: `img_size` or `patch_size` is not a size.
        ResizeError: Unknown policy, preset or interpolation.
    """
    for name, value, known in (
        ("patch_resample", patch_resample, PATCH_MAPS),
        ("window_policy", window_policy, POLICIES),
        ("preset", preset, tuple(PRESETS)),
        ("interpolation", interpolation, (*MODES, "geometric")),
    ):
        if value is not None and value not in known:
            near = near_names(str(value), known) or ", ".join(known)
            raise ResizeError(
                f"{owner}: {name}={value!r} is not known. Use {near}.",
                model=owner,
                argument=name,
                value=value,
                nearest=near.split(", "),
            )
    mode, smooth = PRESETS[preset] if preset else (None, None)
    return Request(
        img_size=None if img_size is None else parse_size(img_size, "img_size", owner),
        patch_size=None if patch_size is None else parse_size(patch_size, "patch_size", owner),
        patch_resample=patch_resample,
        window_policy=window_policy,
        mode=mode if interpolation in (None, "geometric") else interpolation,
        antialias=smooth if antialias is None else bool(antialias),
        table_mode=interpolation,
        constructing=constructing,
        options={k: v for k, v in options.items() if v is not None},
    )


def nothing_asked(request: Request) -> bool:
    """Whether a request is for a size and nothing else."""
    return not request.constructing and request.patch_size is None and not request.options
