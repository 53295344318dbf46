"""The maps that a handler asks its context for: those of `timm_resize.resample`, interpolated as the caller wants."""

from __future__ import annotations

from typing import TypedDict

from timm_resize.core.request import Request
from timm_resize.geometry import Size
from timm_resize.resample import Resample, maps


class Interpolation(TypedDict):
    """Keywords of a map that interpolates."""

    mode: str
    antialias: bool


class Maps:
    """One method per kind of tensor. The interpolation that a handler gives holds where the caller asked for none."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def pos_embed(
        self,
        old: Size,
        new: Size,
        prefix: int = 0,
        dim: int = 1,
        *,
        mode: str = "bicubic",
        antialias: bool = True,
        align_corners: bool | None = None,
    ) -> Resample:
        """Map a flat position embedding (1, prefix + h*w, dim); the keywords hold where the caller asked nothing."""
        corners = None if self.request.mode else align_corners
        how = self.interpolation(mode, antialias)
        return maps.pos_embed(old, new, prefix=prefix, dim=dim, align_corners=corners, **how)

    def pos_embed_map(
        self, old: Size, new: Size, dim: int, *, mode: str = "bicubic", antialias: bool = True
    ) -> Resample:
        """Map a position embedding kept as a map (NHWC: dim=1, NCHW: dim=2)."""
        return maps.pos_embed_map(old, new, dim=dim, **self.interpolation(mode, antialias))

    def rel_pos_table(
        self,
        old: Size,
        new: Size,
        suffix: int = 0,
        dim: int = 0,
        flat: bool = True,
        *,
        mode: str = "geometric",
        antialias: bool = True,
    ) -> Resample:
        """Map a relative position bias table between windows: ((2h-1)*(2w-1) + suffix, heads) if flat."""
        return maps.rel_pos_table(
            old,
            new,
            dim=dim,
            flat=flat,
            suffix=suffix,
            mode=self.request.table_mode or mode,
            antialias=antialias if self.request.antialias is None else self.request.antialias,
        )

    def patch_kernel(self, old: Size, new: Size, *, mode: str = "bicubic", antialias: bool = True) -> Resample:
        """Map a patch projection (out, in, h, w) to another patch size."""
        adjoint = self.request.patch_resample == "adjoint"
        return maps.patch_kernel(old, new, adjoint=adjoint, **self.interpolation(mode, antialias))

    def offset_table(self, old: Size, new: Size, dim: int = 1) -> Resample:
        """Map a bias table (heads, h*w) over absolute offsets, as LeViT's; offset 0 is kept."""
        return maps.offset_table(old, new, dim=dim, **self.interpolation())

    def token_reader(self, old: Size, new: Size, dim: int = 1) -> Resample:
        """Map weights (out, h*w) that sum over the tokens of a grid."""
        return maps.token_reader(old, new, dim=dim, **self.interpolation())

    def token_writer(self, old: Size, new: Size, dim: int = 0) -> Resample:
        """Map weights (h*w, in) or a bias (h*w,) that write one value per token of a grid."""
        return maps.token_writer(old, new, dim=dim, **self.interpolation())

    def token_matrix(self, old: Size, new: Size) -> Resample:
        """Map a matrix (h*w, h*w) that mixes the tokens of a grid."""
        return maps.token_matrix(old, new, **self.interpolation())

    def interpolation(self, mode: str = "bicubic", antialias: bool = True) -> Interpolation:
        """Return mode and antialias as the caller asked for them, else those given."""
        asked = self.request
        return {"mode": asked.mode or mode, "antialias": antialias if asked.antialias is None else asked.antialias}
