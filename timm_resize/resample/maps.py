"""The resamplings of vision models, by what is stored: each returns the map, ready to call on tensors.

Grids and windows are (h, w), flattened row-major. `mode` is one of `MODES`.
"""

from __future__ import annotations

from timm_resize.geometry import Size
from timm_resize.resample.axis import (
    Adjoint,
    AxisMap,
    Geometric,
    Interpolate,
    MirroredOffset,
    PatchKernel,
    PooledReader,
)
from timm_resize.resample.resample import Resample

MODES = ("bicubic", "bilinear", "nearest")


def pos_embed(
    old: Size,
    new: Size,
    *,
    prefix: int = 0,
    dim: int = 1,
    mode: str = "bicubic",
    antialias: bool = True,
    align_corners: bool | None = None,
) -> Resample:
    """Map a flat position embedding (1, prefix + h*w, dim) from one grid to another.

    The first `prefix` rows (class, distillation, register tokens) are copied.

    Source: ViT, arXiv 2010.11929, section 3.2; timm.layers.resample_abs_pos_embed.

    Example:
        >>> import torch
        >>> pos_embed((14, 14), (24, 16), prefix=1)(torch.randn(1, 197, 8)).shape
        torch.Size([1, 385, 8])
    """
    return Resample(_interpolate(old, new, mode, antialias, align_corners), dim=dim, flat=True, prefix=prefix)


def pos_embed_map(old: Size, new: Size, *, dim: int, mode: str = "bicubic", antialias: bool = True) -> Resample:
    """Map a position embedding kept as a map: NHWC for `dim` = 1, NCHW for `dim` = 2.

    Source: timm.layers.resample_abs_pos_embed_nhwc.
    """
    return Resample(_interpolate(old, new, mode, antialias), dim=dim)


def rel_pos_table(
    old: Size,
    new: Size,
    *,
    dim: int = 0,
    flat: bool = True,
    suffix: int = 0,
    mode: str = "geometric",
    antialias: bool = True,
) -> Resample:
    """Map a relative position bias table from window `old` to window `new`.

    Flat tables are ((2h-1)*(2w-1) + suffix, heads); unflattened ones (heads, 2h-1, 2w-1) with `dim` = 1.
    The last `suffix` rows (class token to tokens, tokens to class token, class to class) are copied.

    Args:
        old: Window (h, w) of the table at hand.
        new: Window (h, w) wanted.
        dim: Dimension of the (first) offset axis.
        flat: Both offset axes share dimension `dim`.
        suffix: Rows after the offsets.
        mode: "geometric" is timm's default, otherwise one of `MODES`.
        antialias: For `MODES`.

    Source: Swin, arXiv 2103.14030, equation 4; timm.layers.resize_rel_pos_bias_table.
    """
    old, new = ((2 * h - 1, 2 * w - 1) for h, w in (old, new))  # offsets
    geometric = tuple(Geometric(a, b) for a, b in zip(old, new, strict=True))
    axes = geometric if mode == "geometric" else _interpolate(old, new, mode, antialias)
    return Resample(axes, dim=dim, flat=flat, suffix=suffix)


def offset_table(old: Size, new: Size, *, dim: int = 1, mode: str = "bicubic", antialias: bool = True) -> Resample:
    """Map a LeViT bias table (heads, h*w) over the absolute offsets (|dy|, |dx|), offset 0 pinned.

    Source: LeViT, arXiv 2104.01136, section 4.2 (translation-invariant attention bias).
    """
    axes = tuple(MirroredOffset(a, b, mode, antialias) for a, b in zip(old, new, strict=True))
    return Resample(axes, dim=dim, flat=True)


def token_reader(old: Size, new: Size, *, dim: int = 1, mode: str = "bicubic", antialias: bool = True) -> Resample:
    """Map weights that sum over tokens, (out, h*w): the resized tokens give the same sums.

    Source: adjoint of the token resize; FlexiViT, arXiv 2212.08013, section 3.4.
    """
    axes = tuple(Adjoint(a, b, mode, antialias) for a, b in zip(old, new, strict=True))
    return Resample(axes, dim=dim, flat=True)


def token_writer(old: Size, new: Size, *, dim: int = 0, mode: str = "bicubic", antialias: bool = True) -> Resample:
    """Map weights (h*w, in) or a bias (h*w,) that write one value per token, as an image of size h, w."""
    return Resample(_interpolate(old, new, mode, antialias, exact=True), dim=dim, flat=True)


def token_matrix(old: Size, new: Size, *, mode: str = "bicubic", antialias: bool = True) -> Resample:
    """Map a token-to-token matrix (h*w, h*w): write the new grid (rows), read the new grid (columns)."""
    axes = _interpolate(old, new, mode, antialias, exact=True)
    return Resample(axes, dim=0, flat=True, then=token_reader(old, new, mode=mode, antialias=antialias))


def flatten_linear(
    old: Size,
    new: Size,
    *,
    channels: int,
    channels_last: bool = False,
    pool: bool = False,
    mode: str = "bicubic",
    antialias: bool = True,
) -> Resample:
    """Map a linear layer's weight (out, channels*h*w) that reads a flattened feature map.

    Either way a constant map gives the same outputs on both grids.

    Args:
        old: (h, w) of the map that the weight was made for.
        new: (h, w) of the map that it shall read.
        channels: Channels of the map.
        channels_last: The map was flattened as (h, w, channels) rather than (channels, h, w).
        pool: Read the map as through an adaptive average pool to the old grid; otherwise as the old map resized.
        mode: One of `MODES`, without `pool`.
        antialias: Likewise.

    Example:
        >>> import torch
        >>> flatten_linear((6, 6), (12, 12), channels=16)(torch.randn(10, 16 * 36)).shape
        torch.Size([10, 2304])
    """
    axes: tuple[AxisMap, ...] = token_reader(old, new, mode=mode, antialias=antialias).axes
    if pool:
        axes = tuple(PooledReader(a, b) for a, b in zip(old, new, strict=True))
    before, after = (1, channels) if channels_last else (channels, 1)
    return Resample(axes, dim=1, flat=True, before=before, after=after)


def patch_kernel(
    old: Size, new: Size, *, mode: str = "bicubic", antialias: bool = True, adjoint: bool = False
) -> Resample:
    """Map a patch projection (out, in, h, w) to another patch size, for images resized alike.

    Args:
        old: Patch (h, w) so far.
        new: Patch (h, w).
        mode: Interpolation.
        antialias: Antialias it.
        adjoint: A smaller patch is read as the old kernel reads it enlarged, not by the pseudo-inverse of shrinking.

    Source: FlexiViT, arXiv 2212.08013, section 3.4; timm.layers.resample_patch_embed; `Adjoint` for the other.
    """
    kind: type[PatchKernel | Adjoint] = Adjoint if adjoint else PatchKernel
    return Resample(tuple(kind(a, b, mode, antialias) for a, b in zip(old, new, strict=True)), dim=2)


def _interpolate(
    old: Size, new: Size, mode: str, antialias: bool, align_corners: bool | None = None, exact: bool = False
) -> tuple[AxisMap, ...]:
    use = antialias and mode != "nearest" and not align_corners
    return tuple(Interpolate(a, b, mode, use, align_corners, exact) for a, b in zip(old, new, strict=True))
