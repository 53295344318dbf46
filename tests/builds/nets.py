"""Small models that nobody has taught this package, of which each depends on the size in ways of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Size = tuple[int, int]


def cells(grid: Size) -> int:
    """Return how many cells a grid has."""
    return grid[0] * grid[1]


def over(size: Size, by: int) -> Size:
    """Divide a size, rounding down."""
    return size[0] // by, size[1] // by


class Plain(nn.Module):
    """A ViT in little: positions with a class token, and an attribute that says the size."""

    def __init__(self, img_size: Size, dim: int = 8, classes: int = 3, where: str = "pos_embed") -> None:
        super().__init__()
        self.img_size, self.where = img_size, where
        self.proj = nn.Conv2d(3, dim, 16, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_parameter(where, nn.Parameter(torch.randn(1, 1 + cells(over(img_size, 16)), dim)))
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + getattr(self, self.where)
        return self.head(x.mean(1))


class Bias(nn.Module):
    """A table over relative offsets with three rows of a class token, with an index that a plain function makes."""

    def __init__(self, window: Size, heads: int = 2) -> None:
        super().__init__()
        self.window = list(window)
        self.rel = nn.Parameter(torch.randn((2 * window[0] - 1) * (2 * window[1] - 1) + 3, heads))
        rows, columns = (torch.arange(side) for side in window)
        down = rows[:, None] - rows[None, :] + window[0] - 1
        right = columns[:, None] - columns[None, :] + window[1] - 1
        index = (down[:, None, :, None] * (2 * window[1] - 1) + right[None, :, None, :]).reshape(cells(window), -1)
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("qkh,bkc->bqc", self.rel[self.index], x) / x.shape[1]


class Mixing(nn.Module):
    """A token matrix, an MLP over tokens, and a matrix from all tokens to pooled ones."""

    def __init__(self, grid: Size, pooled: Size) -> None:
        super().__init__()
        self.mix = nn.Linear(cells(grid), cells(grid))
        self.fc1, self.fc2 = nn.Linear(cells(grid), 5), nn.Linear(5, cells(grid), bias=False)
        self.keys = nn.Linear(cells(grid), cells(pooled), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = x + self.mix(x) + self.fc2(self.fc1(x))
        return (x + self.keys(x).mean(-1, keepdim=True)).transpose(1, 2)


class Hidden(nn.Module):
    """Everything that hides: two grids, a bias table with a suffix, token matrices, a window that follows the image, a
    buffer of the same shape at every size, one that is None at some, a list that holds the grid, nothing of the size
    itself."""

    def __init__(self, img_size: Size, dim: int = 8) -> None:
        super().__init__()
        fine, coarse = over(img_size, 8), tuple(-(-side // 2) for side in over(img_size, 8))
        self.proj, self.down = nn.Conv2d(3, dim, 8, 8), nn.Conv2d(dim, dim, 3, 2, 1)
        self.fine = nn.Parameter(torch.randn(1, *fine, dim))
        self.coarse = nn.Parameter(torch.randn(1, dim, *coarse))
        self.bias = Bias(coarse)
        self.mixing = Mixing(coarse, over(img_size, 32))
        window = over(img_size, 32)
        self.local = nn.Parameter(torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), 2))
        self.stages = [{"grid": fine}, {"grid": coarse}]
        self.register_buffer("scale", torch.tensor([1 / math.sqrt(cells(fine))]))
        wide = img_size[1] > img_size[0]
        self.register_buffer("mask", torch.ones(coarse) if wide else None, persistent=False)
        self.register_buffer("noise", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.fine.permute(0, 3, 1, 2) * self.scale
        x = self.down(x) + self.coarse
        if self.mask is not None:
            x = x * self.mask
        x = x.flatten(2).transpose(1, 2)
        return self.mixing(x + self.bias(x)).mean(1) + self.local.mean() + self.noise.mean()


class Axial(nn.Module):
    """A position embedding for rows and one for columns, and patches that are not square."""

    def __init__(self, img_size: Size, dim: int = 8) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, (16, 8), (16, 8))
        h, w = img_size[0] // 16, img_size[1] // 8
        self.rows, self.columns = nn.Embedding(h, dim), nn.Embedding(w, dim)
        self.flat = nn.Parameter(torch.randn(h * w, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).permute(0, 2, 3, 1) + self.rows.weight[:, None] + self.columns.weight
        return x.flatten(1, 2) + self.flat


class Flatten(nn.Module):
    """A plain CNN whose classifier reads the flattened map."""

    def __init__(self, img_size: Size) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 32, 1), nn.BatchNorm2d(4), nn.ReLU())
        h, w = (-(-side // 32) for side in img_size)
        self.head = nn.Linear(4 * h * w, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class AnySize(nn.Module):
    """Nothing depends on the size."""

    def __init__(self, img_size: Size) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))
