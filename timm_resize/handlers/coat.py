"""CoaT and CoaT-Lite: no weight depends on the size, but four patch embeddings record their grids."""

from __future__ import annotations

from timm.models.coat import CoaT

from timm_resize.core.context import Changes, Context, Grids
from timm_resize.core.registry import register
from timm_resize.geometry import left_over, text, times


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
        cell = times(cell, tuple(embed.patch_size))
        size = (yield from ctx.visit(embed, Grids, given=size)).new
        if min(size) < 1:
            ctx.invalid(f"leaves stage {number} no patch: one takes {text(cell)} pixels")
        grids.append(size)
    if model.parallel_blocks is not None and grids[1] != times(grids[3], 4):
        ctx.invalid(
            f"gives a {text(grids[1])} grid at stage 2 and {text(grids[3])} at stage 4, not a quarter of it, "
            "which the parallel blocks need"
        )
    ctx.warn_dropped(left_over(ctx.new_size, times(size, cell)), f"the cells of stage {len(grids)} take {text(cell)}")
