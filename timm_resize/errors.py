"""Errors: what broke, with the numbers, and the nearest thing that works."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ResizeError(ValueError):
    """A resize that cannot be done as asked. Nothing was changed.

    The message says it all; the fields are for programs, each empty where the error is not about one argument.

    Attributes:
        model: Type name of the model, as the message starts.
        argument: Name of the argument that cannot be.
        value: What was given.
        nearest: Values that work, nearest first, as far as they were looked for.

    Example:
        >>> import timm, timm_resize
        >>> model = timm.create_model("vit_tiny_patch16_224", device="meta")
        >>> try:
        ...     timm_resize.plan_resize(model, 8)
        ... except timm_resize.InvalidSizeError as error:
        ...     error.argument, error.value, error.nearest
        ('img_size', (8, 8), ((16, 16),))
    """

    def __init__(
        self,
        message: str = "",
        *,
        model: str = "",
        argument: str = "",
        value: object = None,
        nearest: Sequence[object] = (),
    ) -> None:
        super().__init__(message)
        self.model = model
        self.argument = argument
        self.value = value
        self.nearest = tuple(nearest)


class InvalidSizeError(ResizeError):
    """The size cannot work for this model; the message names the nearest that can."""


class UnsupportedModelError(ResizeError):
    """The model's type or state (scripted, wrapped, quantised …) cannot be resized."""


class StalePlanError(ResizeError):
    """The model is no longer in the state the plan was made for."""


class CheckpointError(ResizeError, RuntimeError):
    """A checkpoint that does not fit the model it is meant for; a RuntimeError too, as torch raises there."""


def near_names(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return known names close to `name` as a comma-separated list, '' when none is close.

    Those that begin with it are closest: 'swin' is no near match of 'swin_tiny_patch4_window7_224' otherwise.

    Example:
        >>> near_names("bicubik", ["bicubic", "bilinear", "nearest"]), near_names("bi", ["bicubic", "bilinear"])
        ('bicubic', 'bicubic, bilinear')
    """
    names = list(known)
    begin = [each for each in names if name and each.startswith(name)]
    return ", ".join(begin[:limit] or difflib.get_close_matches(name, names, n=limit, cutoff=0.6))
