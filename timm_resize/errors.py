"""Errors: what broke, with the numbers, and the nearest thing that works."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ResizeError(ValueError):
    """A resize that cannot be done as asked. Nothing was changed."""


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

    Example:
        >>> near_names("bicubik", ["bicubic", "bilinear", "nearest"])
        'bicubic'
    """
    return ", ".join(difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6))
