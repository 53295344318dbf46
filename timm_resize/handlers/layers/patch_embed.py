"""PatchEmbed and HybridEmbed: where an image becomes a grid."""

from __future__ import annotations

from typing import TypedDict

import torch
from timm.layers import HybridEmbed, PatchEmbed
from torch import nn
from typing_extensions import Unpack

from timm_resize.core.context import Changes, Context, Grids, Returning
from timm_resize.core.registry import register
from timm_resize.errors import UnsupportedModelError
from timm_resize.geometry import Size, ceil_div, divisible, floor_div, left_over, short, text, times
from timm_resize.handlers.layers.conv_size import map_size
from timm_resize.handlers.layers.feature_info import plan_reductions

SIZES = "at least one patch; pixels past the last patch are dropped, with a warning"
"""Which sizes a model takes that has a position per patch."""

RECORDS, FLOORED = "img_size, grid_size, num_patches", "floored to the patch; dropped pixels warned of"
"""State and sizes of a patch embedding."""


SHRUNK = 0.8
"""Of a side of the patch: below it the pseudo-inverse costs what a plan should say."""


class OwnInterpolation(TypedDict, total=False):
    """How a family interpolates where the caller asks for nothing, if not as timm does."""

    mode: str
    antialias: bool


def plan_grids(
    model: nn.Module, embed: nn.Module, ctx: Context, *, growth: int = 1, **own: Unpack[OwnInterpolation]
) -> Returning[Grids]:
    """Visit the patch embedding of `model` and set the pixels per cell in `feature_info`; returns the grids.

    `growth` is the factor of the pixels per cell from each row of `feature_info` to the next; `own` is for a change of
    patch size.
    """
    grids = yield from ctx.visit(embed, Grids, **own)
    yield from plan_reductions(model, ctx, grids.reduction, growth)
    return grids


@register(PatchEmbed, state=RECORDS, sizes=FLOORED)
def plan_patch_embed(
    embed: PatchEmbed, ctx: Context, *, given: Size | None = None, mode: str = "bicubic", antialias: bool = True
) -> Returning[Grids]:
    """Set the sizes; returns the grids, the new one as `forward` makes it.

    With `dynamic_img_pad` forward pads, so the grid it makes is the ceiling, while stock's `grid_size` is the floor.

    Args:
        embed: A `PatchEmbed`, or a class with the same attributes.
        given: The map (h, w) that it is given in place of the image, of which the caller checks that it fits.
        mode: The family's interpolation, for a change of patch size.
        antialias: Likewise.
    """
    patch = ctx.request.patch_size or tuple(embed.patch_size)
    size = ctx.new_size if given is None else given
    grid = floor_div(size, patch)
    if isinstance(embed, PatchEmbed):
        check_projection(embed, ctx, size)
    if given is None:
        _check(embed, ctx, patch, grid)
    yield from _projection(embed, ctx, patch, mode, antialias)
    old = grid if embed.grid_size is None else tuple(embed.grid_size)
    if embed.img_size is not None:
        yield from ctx.attribute(embed, img_size=size, grid_size=grid, num_patches=grid[0] * grid[1])
    return Grids(old, grid, max(patch))


def check_projection(embed: PatchEmbed | HybridEmbed, ctx: Context, size: Size) -> None:
    """Refuse a projection that does not cut a map of `size` into the patches that its embedding counts.

    One that is no convolution, nor a chain of layers, cannot be asked: the plan is tried then.
    """
    proj, patch = embed.proj, tuple(embed.patch_size)
    if not isinstance(proj, (nn.Conv2d, nn.Sequential)):
        return
    made, stride = map_size(proj, size), tuple(getattr(proj, "stride", patch))
    if stride != patch or made != floor_div(size, patch):
        how = f"stride={stride}" if stride != patch else f"a {text(made)} map of {text(size)}"
        raise UnsupportedModelError(
            f"{type(ctx.root).__name__}: {ctx.path(embed)}.proj has {how}, its patches are {patch}: they overlap, or "
            "leave gaps. Give it the stride of its patches, or register a handler for a patch embedding of your own."
        )


def _check(embed: PatchEmbed, ctx: Context, patch: Size, grid: Size) -> None:
    """Refuse an image that forward cannot cut into `grid`; warn of pixels that do not fill a patch."""
    padded = ceil_div(ctx.new_size, patch)
    if getattr(embed, "dynamic_img_pad", False):
        if padded != grid:
            how = f"is padded to a {text(padded)} grid for patch_size={short(patch)}, while the model's position tables"
            if not _sampled_per_forward(ctx.root):
                ctx.invalid(f"{how} are {text(grid)}")
            ctx.warn(f"img_size={ctx.new_size} {how} become {text(grid)}: as in stock, each forward resamples again.")
        return
    if min(grid) < 1:
        ctx.invalid(f"is smaller than patch_size={short(patch)}")
    if padded != grid and isinstance(embed, PatchEmbed) and embed.img_size is not None and not embed.strict_img_size:
        ctx.invalid(f"is not divisible by patch_size={short(patch)}, which forward checks")
    ctx.warn_dropped(left_over(ctx.new_size, times(grid, patch)), f"patch_size={short(patch)}")


def _sampled_per_forward(root: nn.Module) -> bool:
    """Whether the model resamples its position embedding to the grid at hand in each forward."""
    return bool(getattr(root, "dynamic_img_size", False))


def _projection(embed: PatchEmbed | HybridEmbed, ctx: Context, patch: Size, mode: str, antialias: bool) -> Changes:
    """Resample the projection to another patch size, keeping the Conv2d and its Parameter."""
    proj, old = embed.proj, tuple(embed.patch_size)
    if patch == old:
        return
    if not isinstance(proj, nn.Conv2d):
        raise UnsupportedModelError(
            f"{type(ctx.root).__name__}: patch_size={short(patch)} resizes the kernel of a torch.nn.Conv2d, and "
            f"{ctx.path(proj)} is a {type(proj).__module__}.{type(proj).__name__}. Put the Conv2d in its place for the "
            "resize."
        )
    if ctx.request.patch_resample == "pinv" and min(n / o for n, o in zip(patch, old, strict=True)) < SHRUNK:
        ctx.note(
            f"patch_size {short(old)} -> {short(patch)} by the pseudo-inverse, as stock timm. patch_resample='adjoint' "
            "keeps more: on DINOv2 at patch 8 a cosine of 0.99 to the original features against 0.84 (docs/accuracy.md)"
        )
    yield from ctx.parameter(proj, "weight", ctx.patch_kernel(old, patch, mode=mode, antialias=antialias))
    yield from ctx.attribute(proj, kernel_size=patch, stride=patch)
    yield from ctx.attribute(embed, patch_size=patch)


@register(HybridEmbed, state="img_size, feature_size, grid_size, num_patches", sizes="the backbone's map % patch")
def plan_hybrid_embed(
    embed: HybridEmbed, ctx: Context, *, mode: str = "bicubic", antialias: bool = True
) -> Returning[Grids]:
    """Set the sizes from a dry run of the backbone on the meta device; returns as `plan_patch_embed`."""
    patch, old = ctx.request.patch_size or tuple(embed.patch_size), tuple(embed.grid_size)
    feature = ctx.output_size(embed.backbone, channels=embed.in_chans)
    grid = floor_div(feature, patch)
    check_projection(embed, ctx, feature)
    if min(grid) < 1 or not (embed.dynamic_img_pad or divisible(feature, patch)):
        ctx.invalid(f"gives a {text(feature)} feature map, not divisible by patch_size={short(patch)}")
    yield from _projection(embed, ctx, patch, mode, antialias)
    if not embed.dynamic_img_pad and not _sampled_per_forward(ctx.root):  # a map of one cell would be broadcast
        yield from ctx.guard(embed.proj, lambda size: floor_div(size, patch), feature)
    ratio = floor_div(ctx.new_size, feature)
    if floor_div(floor_div(ctx.new_size, ratio), patch) != grid:
        ctx.warn(
            f"img_size={ctx.new_size} is rounded up to a {text(feature)} feature map, so forward_intermediates, "
            f"which divides by {text(ratio)} and rounds down, fails; forward does not."
        )
    yield from ctx.attribute(
        embed,
        img_size=ctx.new_size,
        feature_size=torch.Size(feature),
        feature_ratio=ratio,
        grid_size=grid,
        num_patches=grid[0] * grid[1],
    )
    return Grids(old, grid, max(times(ratio, patch)))
