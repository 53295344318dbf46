"""A check of the input's size for families that run silently wrong at a size they are not set to.

A plain attribute and one forward pre-hook, which a resize keeps up to date: four comparisons of integers, so that it
costs microseconds, vanishes under `torch.jit.trace` and `torch.fx`, becomes constants under `torch.compile` and
`torch.export`, and compiles under `torch.jit.script`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from collections.abc import Callable
from typing import Tuple  # noqa: UP035  (torch.jit.script reads the hook's annotations as written)

import torch
import torch.fx

from timm_resize.errors import InvalidSizeError
from timm_resize.geometry import Size

GUARD = "input_guard"
"""Attribute of a guarded module: (model, its (H, W), then the lowest and highest side that it takes: h, h, w, w)."""

HOOK = "timm_resize.guard"
"""Key of the check among the module's forward pre-hooks."""

Guard = tuple[str, int, int, int, int, int, int]


def guard_of(model: str, image: Size, given: Size, grid: Callable[[Size], Size]) -> Guard:
    """Return the sides that give a module the same grid as the ones it is set to.

    Args:
        model: Type name of the model, for the message.
        image: (H, W) in pixels that the model is set to.
        given: (h, w) that the guarded module is then given: the image, or a map.
        grid: (h, w) given → (h, w) of the grid that its weights are for; the axes do not depend on each other.
    """
    right, bounds = grid(given), []
    for axis, side in enumerate(given):
        for step in (-1, 1):
            edge = side
            while edge + step > 0 and grid((edge + step, edge + step))[axis] == right[axis]:
                edge += step
                if abs(edge - side) > 1024:
                    raise AssertionError(f"{model}: the grid does not depend on the size")
            bounds.append(edge)
    return (model, *image, bounds[0], bounds[1], bounds[2], bounds[3])


def check_input_size(self, args: Tuple[torch.Tensor]) -> None:  # noqa: UP006
    """Raise InvalidSizeError if the input (batch, channels, h, w) is not of the size that the module is set to."""
    if torch.jit.is_scripting():  # noqa: SIM108  the compiler of scripts drops the other branch
        symbolic = False
    else:
        symbolic = isinstance(args[0], torch.fx.Proxy)  # torch.fx follows no comparison; its graph has no check
    if symbolic:
        return
    model, height, width, h_min, h_max, w_min, w_max = self.input_guard
    h, w = args[0].shape[-2], args[0].shape[-1]
    if h < h_min or h > h_max or w < w_min or w > w_max:
        text = (
            f"{model}: img_size=({height}, {width}) is set, and the input is {h}x{w}, where it takes "
            f"{h_min} to {h_max} by {w_min} to {w_max}. Resize the model to the image first: set_input_size or "
            "timm_resize.resize_."
        )
        if torch.jit.is_scripting():
            raise ValueError(text)
        else:  # the compiler of scripts drops this branch, whose class it does not know
            raise InvalidSizeError(text)
