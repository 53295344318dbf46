"""BEiT's positions and bias tables, in the classes that the library has of it.

Its forward interpolates both to the image at hand, tables bilinearly and without antialias, and makes the index into
them anew. So a resized model computes what the unresized one does at that size. For a size that is not square it takes
positions for those of a square grid, and a table's height for its width.
"""

from __future__ import annotations

from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.geometry import floor_div
from timm_resize.handlers.layers.relative_position import resize_bias_table
from timm_resize.handlers.libraries.transformers.configs import as_pair, refuse_oblong
from timm_resize.handlers.libraries.transformers.positions import plan_embeddings

STATE = (
    "relative_position_bias_table ((2h-1)*(2w-1) + 3, heads), shared or per block; position_embeddings, where it has "
    "them; config.image_size"
)

METHOD = "tables bilinear, positions bicubic, both as forward does it; class token kept"

SIZES = "square, unless it has neither table nor positions; at least one patch"


def plan_positions(embeddings: nn.Module, ctx: Context) -> Changes:
    """Resample the position embeddings, if there are any."""
    if embeddings.position_embeddings is not None:
        refuse_oblong(ctx, "each forward takes the positions for those of a square grid")
    yield from plan_embeddings(embeddings, ctx, prefix=1)


def plan_bias(bias: nn.Module, ctx: Context) -> Changes:
    """Resample a table from the grid that it is for to that of the new size; the class token's three rows are kept."""
    refuse_oblong(ctx, "each forward takes the height of a bias table for its width")
    # a layer, or what holds the table that all share
    owner = next(m for m in ctx.root.modules() if any(child is bias for child in m._modules.values()))
    patch = getattr(owner if hasattr(owner, "patch_size") else owner.config, "patch_size", 0)
    window = floor_div(ctx.new_size, as_pair(patch))
    yield from resize_bias_table(bias, ctx, window, class_token=True, mode="bilinear", antialias=False)
