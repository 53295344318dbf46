"""What vision transformers of the library have in common: patch embeddings, and a position for each patch.

The library interpolates positions in its forwards (`interpolate_pos_encoding`), and its checkpoints are used so. What
it does there is what its models do here where the caller asks for nothing: bicubic with the kernel of a = -0.75
(`antialias=False`), corners not aligned, except where a handler says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_resize.core.context import Changes, Context, Grids, Rebuild, Returning
from timm_resize.geometry import Size, floor_div, left_over, short, times
from timm_resize.handlers.libraries.transformers.configs import as_pair, like, refuse_oblong

SIZES = "at least one patch; pixels past the last patch are dropped, with a warning"

SQUARE = "square; at least one patch; pixels past the last patch are dropped, with a warning"

STATE = "position_embeddings (1, prefix + h*w, dim); config.image_size"

METHOD = "bicubic, as interpolate_pos_encoding does it; prefix tokens kept"


def plan_embeddings(
    embeddings: nn.Module, ctx: Context, *, prefix: int, mode: str = "bicubic", antialias: bool = False
) -> Returning[Grids]:
    """Set the sizes of a module with `patch_embeddings`, and resample its `position_embeddings`, if it has any.

    Args:
        embeddings: As `ViTEmbeddings`.
        ctx: The plan's.
        prefix: Positions before those of the patches.
        mode: The library's own interpolation.
        antialias: Likewise.

    Returns:
        The grids of patches.
    """
    grids = yield from plan_patches(embeddings.get_submodule("patch_embeddings"), ctx)
    how = ctx.pos_embed(grids.old, grids.new, prefix, mode=mode, antialias=antialias)
    yield from ctx.parameter(embeddings, "position_embeddings", how, optional=True)
    yield from follow_size(embeddings, ctx)
    return grids


def plan_patches(patches: nn.Module, ctx: Context) -> Returning[Grids]:
    """Set the sizes that a patch embedding keeps; returns the grids."""
    patch, old_size = (as_pair(getattr(patches, name)) for name in ("patch_size", "image_size"))
    new = patch_grid(ctx, patch)
    yield from follow_size(patches, ctx)
    records = {"num_patches": new[0] * new[1], "patch_shape": new}
    yield from ctx.attribute(patches, **{name: value for name, value in records.items() if hasattr(patches, name)})
    return Grids(floor_div(old_size, patch), new, max(patch))


def plan_tower(embeddings: nn.Module, ctx: Context, *, prefix: int) -> Changes:
    """Resample the `position_embedding`, an `nn.Embedding`, of a vision tower whose image size is one number.

    Args:
        embeddings: As `CLIPVisionEmbeddings`.
        ctx: The plan's.
        prefix: Positions before those of the patches.
    """
    refuse_oblong(ctx, f"{type(embeddings).__name__} has one number for both sides")
    positions = embeddings.get_submodule("position_embedding")
    patch, old_size = (as_pair(getattr(embeddings, name)) for name in ("patch_size", "image_size"))
    old, new = floor_div(old_size, patch), patch_grid(ctx, patch)
    count = prefix + new[0] * new[1]
    how = ctx.pos_embed(old, new, prefix, dim=0, antialias=False)
    yield from ctx.parameter(positions, "weight", how)
    yield from ctx.attribute(positions, num_embeddings=count)
    if old != new:
        yield from ctx.buffer(embeddings, "position_ids", (1, count), Rebuild(position_ids, (count,)))
    yield from ctx.attribute(embeddings, num_patches=count - prefix, num_positions=count)
    yield from follow_size(embeddings, ctx)


def position_ids(count: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the numbers of positions (1, count)."""
    return torch.arange(count, device=device, dtype=dtype)[None]


def patch_grid(ctx: Context, patch: Size) -> Size:
    """Return the grid that a projection makes of the new size; refuse one without a patch, warn of dropped pixels."""
    grid = floor_div(ctx.new_size, patch)
    if min(grid) < 1:
        ctx.invalid(f"is smaller than patch_size={short(patch)}")
    ctx.warn_dropped(left_over(ctx.new_size, times(grid, patch)), f"patch_size={short(patch)}")
    return grid


def follow_size(module: nn.Module, ctx: Context) -> Changes:
    """Set the `image_size` of a module that keeps one, in the form that it has."""
    value = getattr(module, "image_size", None)
    if value is not None:
        yield from ctx.attribute(module, image_size=like(value, ctx.new_size))
