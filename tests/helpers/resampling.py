"""Seeded tensors, and resizes computed by torch alone, for the tests of `timm_resize.resample`."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

GRIDS = [
    ((7, 7), (12, 12)),
    ((14, 14), (9, 9)),
    ((7, 7), (4, 14)),
    ((6, 9), (6, 13)),
    ((6, 9), (5, 9)),
    ((14, 14), (7, 28)),
    ((8, 3), (3, 8)),
    ((2, 2), (5, 3)),
]
"""Growing, shrinking, mixed, one axis unchanged, equal counts of another aspect, swapped, tiny."""

KERNELS = [("bicubic", True), ("bicubic", False), ("bilinear", True), ("bilinear", False), ("nearest", False)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ramp(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float64)


def close(got: torch.Tensor, want: object, atol: float = 1e-5) -> None:
    want = want if isinstance(want, torch.Tensor) else torch.tensor(want)
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0)


def one_axis(old: int, new: int, mode: str, antialias: bool) -> torch.Tensor:
    """Resize each basis vector as an image of three equal rows: (new, old), float64."""
    basis = torch.eye(old, dtype=torch.float64).reshape(old, 1, 1, old).repeat(1, 1, 3, 1)
    image = F.interpolate(basis, size=(3, new), mode=mode, antialias=antialias)
    return image[:, 0, 1].T


def grid_resize(old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Return timm's default resize of a flattened image as one matrix, from torch on 2-D basis images."""
    count = old[0] * old[1]
    basis = torch.eye(count, dtype=torch.float64).reshape(count, 1, *old)
    return F.interpolate(basis, size=new, mode="bicubic", antialias=True).reshape(count, -1).T
