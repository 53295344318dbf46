"""Sampling an axis at arbitrary positions: for grids and tables whose geometry `interpolate` cannot express."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_matrix(
    positions: Tensor, old: int, *, spacing: float | Tensor = 1.0, mode: str = "bicubic", antialias: bool = True
) -> Tensor:
    """Return the (new, old) matrix that reads `old` samples, which lie at 0, 1, 2 …, at `positions`.

    At the positions of `torch.nn.functional.interpolate` the rows are its own: with `antialias` the kernel is as
    wide as the new spacing, cut at the border and normalised; without it the border sample is repeated.

    Args:
        positions: (new,) real positions in units of the old samples, float64.
        old: Number of old samples.
        spacing: Distance between neighbouring new samples in the same unit, one or (new,); above 1 the axis shrinks.
        mode: "bicubic", "bilinear" or "nearest".
        antialias: Widen the kernel when shrinking; the cubic is then the one with a = -0.5, also when growing.

    Returns:
        float64, rows sum to 1.
    """
    sample = torch.arange(old, dtype=torch.float64)
    if mode == "nearest":
        return (positions.round().clamp(0, old - 1)[:, None] == sample).to(torch.float64)
    if antialias:
        width = torch.as_tensor(spacing, dtype=torch.float64).clamp(min=1.0).expand(len(positions))
        distance = (sample - positions[:, None]).abs() / width[:, None]
        weight = _triangle(distance) if mode == "bilinear" else _cubic(distance, -0.5)
        return weight / weight.sum(1, keepdim=True)
    near = positions.floor()[:, None] + torch.arange(-1, 3, dtype=torch.float64)  # (new, 4) neighbours
    distance = (near - positions[:, None]).abs()
    weight = _triangle(distance) if mode == "bilinear" else _cubic(distance, -0.75)
    columns = near.clamp(0, old - 1).long()
    return torch.zeros(len(positions), old, dtype=torch.float64).scatter_add_(1, columns, weight)


def _triangle(x: Tensor) -> Tensor:
    """Return the linear interpolation kernel at distance `x` >= 0."""
    return (1.0 - x).clamp(min=0.0)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Return the cubic convolution kernel with slope `a` at 1, at distance `x` >= 0.

    Source: Keys, Cubic convolution interpolation for digital image processing, 1981, equation 14.
    """
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))
