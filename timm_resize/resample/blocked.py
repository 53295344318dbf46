"""A map that is kept block by block, as NesT keeps its position embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from timm_resize.resample.resample import Resample


@dataclass(frozen=True)
class Blocked(Resample):
    """A map kept block by block, (1, blocks², h*w, dim): joined, resampled by `axes` as one map, cut up again.

    Attributes:
        blocks: Blocks per side, before and after.
    """

    blocks: int = 1

    def shape(self, old: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that a tensor of shape `old` gets; ValueError when it does not fit."""
        cells = [side // self.blocks for side in self._sides("old")]
        if len(old) != 4 or tuple(old[1:3]) != (self.blocks**2, cells[0] * cells[1]):
            raise ValueError(f"{tuple(old)} is not {self.blocks**2} blocks of {cells[0]}x{cells[1]}")
        new = [side // self.blocks for side in self._sides("new")]
        return (old[0], old[1], new[0] * new[1], old[3])

    def _apply(self, tensor: Tensor) -> Tensor:
        side, (height, width), dim = self.blocks, self._sides("old"), tensor.shape[-1]
        joined = tensor.reshape(-1, side, side, height // side, width // side, dim).transpose(2, 3)
        out = self._grid(joined.reshape(-1, height, width, dim))
        height, width = self._sides("new")
        cut = out.reshape(-1, side, height // side, side, width // side, dim).transpose(2, 3)
        return cut.reshape(-1, side**2, (height // side) * (width // side), dim)

    def _sides(self, which: str) -> tuple[int, int]:
        height, width = (int(getattr(axis, which)) for axis in self.axes)
        return height, width
