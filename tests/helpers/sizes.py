"""Checks that hold for any model at any size, and position tables with a known answer."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

import timm_resize
from tests.helpers.oracle import assert_same_structure, image, redraw_, stock

ODD = [230, 239, 240, 250, 272, (250, 224), (224, 239), 33, 17, 8]
"""Sizes at which constructors and forwards round apart, two non-square ones, and small ones."""


def wave(grid: tuple[int, int]) -> torch.Tensor:
    """Sample a smooth function of the place in the image, unlike in height and width, at the cell centres: (h, w)."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid)
    return (torch.cos(math.pi * y)[:, None] + 0.5 * torch.cos(2 * math.pi * x)).float()


def transposed_table(table: torch.Tensor, grid: tuple[int, int], prefix: int = 0) -> torch.Tensor:
    """Exchange height and width of a flat table (1, prefix + h*w, dim)."""
    cells = table[:, prefix:].reshape(1, *grid, -1).transpose(1, 2).flatten(1, 2)
    return torch.cat([table[:, :prefix], cells], 1).detach().clone()


def resized(model: nn.Module, size: Any) -> nn.Module:
    """Resize `model` in place, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm_resize.resize_(model, size)
    return model


def pair(size: Any) -> tuple[int, int]:
    """Return (H, W)."""
    return (size, size) if isinstance(size, int) else size


def assert_runs_or_names_sizes_that_run(model: nn.Module, size: Any) -> None:
    """At `size`, output and feature maps can be computed; or the error names sizes at which they can."""
    advice, sizes = None, [pair(size)]
    try:
        resized(model, size)
    except timm_resize.InvalidSizeError as error:
        advice, sizes = str(error).partition(". Use")[2], timm_resize.nearest_sizes(model, size)
    assert sizes, size
    for usable in sizes:
        assert advice is None or str(usable[0]) in advice
        _assert_runs(resized(model, usable), usable)


def _assert_runs(model: nn.Module, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        assert model(image(size)).isfinite().all()
        for features in model.forward_intermediates(image(size), intermediates_only=True):
            assert features.isfinite().all()
            tall = features.shape[2] - features.shape[3]  # of the image's orientation, or square after rounding
            assert tall * (size[0] - size[1]) > 0 or tall == 0


def assert_as_built(name: str, size: Any, **kwargs: Any) -> None:
    """A resized model has the structure of one that stock builds at the size: shapes, buffers, attributes."""
    assert_same_structure(resized(stock(name, **kwargs), size), stock(name, img_size=size, **kwargs))


def assert_features_as_stock(name: str, size: tuple[int, int], **kwargs: Any) -> None:
    """A resized `features_only` model makes the feature maps of stock's at the size with the same weights."""
    ours = resized(redraw_(stock(name, features_only=True, **kwargs)), size)
    theirs = stock(name, features_only=True, img_size=size, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        for a, b in zip(ours(image(size)), theirs(image(size)), strict=True):
            torch.testing.assert_close(a, b)


def assert_transposes(model: nn.Module, turned: nn.Module, size: tuple[int, int]) -> None:
    """`turned`, the model with height and width exchanged, resized likewise, agrees on the transposed image."""
    x = image(size)
    with torch.inference_mode():
        a, b = resized(model, size)(x), resized(turned, size[::-1])(x.transpose(-1, -2).contiguous())
    torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
