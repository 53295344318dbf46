"""torchvision's MaxViT: partitions of a fixed count of cells, in windows and in grids."""

from __future__ import annotations

from torchvision.models.maxvit import MaxVit, MaxVitBlock, PartitionAttentionLayer, RelativePositionalMultiHeadAttention

from timm_resize.core.context import Changes, Context, Rebuild
from timm_resize.core.registry import register
from timm_resize.geometry import Size, ceil_div, divisible, text, times
from timm_resize.handlers.layers.relative_position import relative_position_index


def image_size(model: MaxVit) -> Size:
    """Return the size (H, W) that the first block's map is a quarter of; up to 3 pixels less give the same maps."""
    return times(model.blocks[0].grid_size, 4)


@register(
    MaxVit,
    state="grid_size of each block; relative_position_bias_table of each partition, for another partition_size",
    method="maps counted anew; tables geometric linear",
    sizes="every block's map is as many partitions high as wide",
    options=("window_size",),
    guarded=True,
    size=image_size,
)
def plan_maxvit(model: MaxVit, ctx: Context) -> Changes:
    """Set each block's map; `window_size` is torchvision's `partition_size`, whose tables are then resampled.

    An image of another size has more or fewer partitions, of the same size, with `window_policy="scale"` larger ones.
    Grids count the partitions along the height for both axes, so a map must have as many along its width. Forward puts
    as many partitions of an image of another shape together as if it had this one, so the stem checks it.
    """
    size, part = ceil_div(ctx.new_size, 2), _partition(model, ctx)
    for block in model.blocks:
        size = ceil_div(size, 2)
        if not divisible(size, part):
            ctx.invalid(f"gives a {text(size)} map in {ctx.path(block)}, not divisible by partition_size={part}")
        if size[0] != size[1]:
            ctx.invalid(f"gives a {text(size)} map in {ctx.path(block)}, which torchvision partitions only if square")
        yield from ctx.visit(block, map_size=size, partition=part)
    yield from ctx.attribute(model, partition_size=part)
    yield from ctx.guard(model.stem, lambda size: ceil_div(size, 4))


def _partition(model: MaxVit, ctx: Context) -> int:
    """Return the side of a partition in cells: as asked, else as it is or, by policy, in proportion to the image."""
    asked, held = ctx.size_option("window_size"), int(model.partition_size)
    if asked is not None and asked[0] != asked[1]:
        ctx.invalid(f"cannot have window_size={asked}: torchvision's partitions are squares")
    if asked is None and ctx.request.window_policy == "scale":
        return max(1, held * ceil_div(ctx.new_size, 4)[0] // int(model.blocks[0].grid_size[0]))
    return held if asked is None else asked[0]


@register(MaxVitBlock, state="grid_size", sizes="whole partitions")
def plan_block(block: MaxVitBlock, ctx: Context, *, map_size: Size, partition: int) -> Changes:
    """Set a block's map and those of both attentions of each of its layers."""
    yield from ctx.attribute(block, grid_size=map_size)
    for layer in block.layers:
        for attention in (layer.layers.window_attention, layer.layers.grid_attention):
            yield from ctx.visit(attention, map_size=map_size, partition=partition)


@register(PartitionAttentionLayer, state="grid_size, n_partitions, p, g", sizes="whole partitions")
def plan_partition_attention(
    layer: PartitionAttentionLayer, ctx: Context, *, map_size: Size, partition: int
) -> Changes:
    """Set the map, how many partitions it has along an axis, and which of both counts cells and which partitions."""
    count = map_size[0] // partition
    p, g = (partition, count) if layer.partition_type == "window" else (count, partition)
    yield from ctx.attribute(layer, grid_size=map_size, n_partitions=count, p=p, g=g)
    yield from ctx.visit(layer.attn_layer[1], partition=partition)


@register(
    RelativePositionalMultiHeadAttention,
    state="relative_position_bias_table ((2p-1)^2, heads), relative_position_index",
    method="geometric linear",
)
def plan_attention(attention: RelativePositionalMultiHeadAttention, ctx: Context, *, partition: int) -> Changes:
    """Resample the table over a partition's relative positions, and rebuild the index into it."""
    old, new = (attention.size,) * 2, (partition,) * 2
    if old == new:
        return
    yield from ctx.parameter(attention, "relative_position_bias_table", ctx.rel_pos_table(old, new))
    area = partition**2
    yield from ctx.buffer(attention, "relative_position_index", (area, area), Rebuild(relative_position_index, (new,)))
    yield from ctx.attribute(attention, size=partition, max_seq_len=area)
