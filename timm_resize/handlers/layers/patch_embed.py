"""PatchEmbed and HybridEmbed: where an image becomes a grid."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import HybridEmbed, PatchEmbed
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.copies import meta_copy
from timm_resize.core.registry import register
from timm_resize.geometry import Size, ceil_div, floor_div


@register(PatchEmbed, state="img_size, grid_size, num_patches", sizes="floored to the patch; dropped pixels warned of")
def plan_patch_embed(
    embed: PatchEmbed, ctx: Context, *, mode: str = "bicubic", antialias: bool = True, align_corners: bool | None = None
) -> Changes:
    """Set the sizes; returns the old grid, the new one as `forward` makes it, and the reduction (pixels per cell).

    The keywords are the family's interpolation, for a change of patch size.

    With `dynamic_img_pad` forward pads, so the grid it makes is the ceiling, while stock's `grid_size` is the floor.
    """
    old_patch = tuple(embed.patch_size)
    patch = ctx.request.patch_size or old_patch
    new_size = ctx.new_size
    grid = floor_div(new_size, patch)
    if embed.dynamic_img_pad:
        if ceil_div(new_size, patch) != grid and not _sampled_per_forward(ctx.root):
            ctx.invalid(
                f"is padded to a {_by(ceil_div(new_size, patch))} grid for patch_size={_of(patch)}, while the "
                f"model's position tables are {_by(grid)}"
            )
    elif min(grid) < 1:
        ctx.invalid(f"is smaller than patch_size={_of(patch)}")
    else:
        _check_rest(embed, ctx, patch)
    yield from _projection(embed, ctx, patch, mode=mode, antialias=antialias)
    old_grid = None if embed.grid_size is None else tuple(embed.grid_size)
    if embed.img_size is not None:
        yield from ctx.attribute(embed, img_size=new_size, grid_size=grid, num_patches=grid[0] * grid[1])
    return old_grid, grid, max(patch)


def _check_rest(embed: PatchEmbed, ctx: Context, patch: Size) -> None:
    """Refuse or warn of pixels that do not fill a patch."""
    rest = (ctx.new_size[0] % patch[0], ctx.new_size[1] % patch[1])
    if not any(rest):
        return
    if embed.img_size is not None and not embed.strict_img_size:
        ctx.invalid(f"is not divisible by patch_size={_of(patch)}, which forward checks")
    ctx.warn(
        f"img_size={ctx.new_size} drops {rest[0]} rows and {rest[1]} columns of pixels at the "
        f"bottom and right: patch_size={_of(patch)}."
    )


def _sampled_per_forward(root: nn.Module) -> bool:
    """Whether the model resamples its position embedding to the grid at hand in each forward."""
    return bool(getattr(root, "dynamic_img_size", False))


def _projection(embed: nn.Module, ctx: Context, patch: Size, **default: Any) -> Changes:
    """Resample the projection to another patch size, keeping the Conv2d and its Parameter."""
    proj: Any = embed.proj
    old = tuple(embed.patch_size)  # type: ignore[arg-type]
    if patch != old:
        if not isinstance(proj, nn.Conv2d):
            ctx.invalid(f"with patch_size={_of(patch)} needs a Conv2d projection, not {type(proj).__name__}")
        yield from ctx.parameter(proj, "weight", ctx.patch_kernel(old, patch, **default))
        yield from ctx.attribute(proj, kernel_size=patch, stride=patch)
        yield from ctx.attribute(embed, patch_size=patch)


@register(HybridEmbed, state="img_size, feature_size, grid_size, num_patches", sizes="the backbone's map % patch")
def plan_hybrid_embed(
    embed: HybridEmbed,
    ctx: Context,
    *,
    mode: str = "bicubic",
    antialias: bool = True,
    align_corners: bool | None = None,
) -> Changes:
    """Set the sizes from a dry run of the backbone on the meta device; returns as `plan_patch_embed`."""
    patch = ctx.request.patch_size or tuple(embed.patch_size)
    old_grid = tuple(embed.grid_size)
    feature = backbone_size(embed.backbone, ctx, embed.in_chans)
    grid = floor_div(feature, patch)
    if min(grid) < 1 or (not embed.dynamic_img_pad and (feature[0] % patch[0] or feature[1] % patch[1])):
        ctx.invalid(f"gives a {_by(feature)} feature map, not divisible by patch_size={_of(patch)}")
    yield from _projection(embed, ctx, patch, mode=mode, antialias=antialias)
    if not embed.dynamic_img_pad and not _sampled_per_forward(ctx.root):  # a map of one cell would be broadcast
        yield from ctx.guard(embed.proj, lambda size: floor_div(size, patch), feature)
    ratio = (ctx.new_size[0] // feature[0], ctx.new_size[1] // feature[1])
    if any(side // r // p != cells for side, r, p, cells in zip(ctx.new_size, ratio, patch, grid, strict=True)):
        ctx.warn(
            f"img_size={ctx.new_size} is rounded up to a {_by(feature)} feature map, so forward_intermediates, "
            f"which divides by {_by(ratio)} and rounds down, fails; forward does not."
        )
    yield from ctx.attribute(
        embed,
        img_size=ctx.new_size,
        feature_size=torch.Size(feature),
        feature_ratio=ratio,
        grid_size=grid,
        num_patches=grid[0] * grid[1],
    )
    return old_grid, grid, max(ratio[0] * patch[0], ratio[1] * patch[1])


def backbone_size(backbone: nn.Module, ctx: Context, in_chans: int) -> Size:
    """Return (h, w) of the backbone's (last) feature map at the new size, without computing a value."""
    twin = meta_copy(backbone).eval()
    dtype = next(twin.parameters()).dtype
    try:
        with torch.no_grad():
            out = twin(torch.empty(1, in_chans, *ctx.new_size, device="meta", dtype=dtype))
    except torch.cuda.OutOfMemoryError:  # also of the CPU; says nothing of the size
        raise
    except RuntimeError as error:
        ctx.invalid(f"cannot pass the convolutional backbone ({error})")
    out = out[-1] if isinstance(out, (list, tuple)) else out
    return int(out.shape[-2]), int(out.shape[-1])


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _of(patch: Size) -> str:
    return str(patch[0]) if patch[0] == patch[1] else str(patch)
