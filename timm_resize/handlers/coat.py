"""CoaT and CoaT-Lite: no weight depends on the size, but four patch embeddings record their grids."""

from __future__ import annotations

from timm.models.coat import CoaT

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size, floor_div, text


@register(
    CoaT,
    state="patch_embed1..4: img_size, grid_size, num_patches (no weights)",
    method="set",
    sizes="CoaT: stage 2's grid % 4, as for multiples of 32; CoaT-Lite: at least 32; dropped pixels warned of",
    examples={
        "coat_tiny": {"embed_dims": [32] * 4, "serial_depths": [1] * 4, "parallel_depth": 1},
        "coat_lite_tiny": {"embed_dims": [16, 32, 32, 64], "serial_depths": [1] * 4},
    },
)
def plan_coat(model: CoaT, ctx: Context) -> Changes:
    """Give each stage the grid of the one before, floored as its convolution floors it.

    A pruned feature model has None where a stage was.
    """
    size, cell, grids = ctx.new_size, (1, 1), []
    for number in range(1, 5):
        embed = getattr(model, f"patch_embed{number}")
        if embed is None:
            break
        patch = tuple(embed.patch_size)
        cell = (cell[0] * patch[0], cell[1] * patch[1])
        grid = floor_div(size, patch)
        if min(grid) < 1:
            ctx.invalid(f"leaves stage {number} no patch: one takes {text(cell)} pixels")
        ctx._visited.add(id(embed))  # its input is a map, not the image that its own handler assumes
        yield from ctx.attribute(embed, img_size=size, grid_size=grid, num_patches=grid[0] * grid[1])
        grids.append(grid)
        size = grid
    if model.parallel_blocks is not None:
        _check_parallel(ctx, grids)
    rest = (ctx.new_size[0] - size[0] * cell[0], ctx.new_size[1] - size[1] * cell[1])
    if any(rest):
        ctx.warn(
            f"img_size={ctx.new_size} leaves the last {rest[0]} rows and {rest[1]} columns of pixels out of "
            f"stage {len(grids)}, whose cells take {text(cell)}."
        )


def _check_parallel(ctx: Context, grids: list[Size]) -> None:
    """Refuse grids that the parallel blocks cannot add up: they scale stages 3 and 4 by exactly 2 and 4."""
    second, last = grids[1], grids[3]
    if second != (last[0] * 4, last[1] * 4):
        ctx.invalid(
            f"gives a {text(second)} grid at stage 2 and {text(last)} at stage 4, not a quarter of it, "
            "which the parallel blocks need"
        )
