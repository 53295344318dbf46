"""MaxxVit: CoAtNet, MaxViT, MaxxViT and its V2, and the parallel-partition variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from timm.models.maxxvit import (
    ConvNeXtBlock,
    MaxxVit,
    MaxxVitBlock,
    MbConvBlock,
    ParallelMaxxVitBlock,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
    TransformerBlock2d,
)
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, divisible, floor_div, short, text
from timm_resize.handlers.layers.conv_size import map_size, parts

Block: TypeAlias = MbConvBlock | ConvNeXtBlock | TransformerBlock2d | MaxxVitBlock | ParallelMaxxVitBlock

Partitioned: TypeAlias = PartitionAttention2d | PartitionAttentionCl | ParallelPartitionAttention

PARTITION_RATIO = 32
"""What timm's configurations divide the image by; a feature wrapper no longer has the model's own."""

_NAMES = ("window_size", "grid_size", "partition_ratio")
OPTIONS = (*_NAMES, *(f"transformer_{name}" for name in _NAMES))
"""As `set_input_size` calls them, and as the constructor does."""

_TINY = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 64), "stem_width": (8, 32)}

_COAT = {"depths": (1, 1, 2, 1), "embed_dim": (32, 32, 64, 64), "stem_width": (8, 32)}


@register(
    MaxxVit,
    state="rel_pos: over the whole map in CoAtNet, over each window or grid partition in MaxViT",
    method="tables resampled, coordinates rebuilt; partitions are img_size // partition_ratio",
    sizes="MaxViT: maps divisible by the partition (multiples of 32); CoAtNet: even maps, else a row is dropped",
    options=OPTIONS,
    examples={
        "coatnet_pico_rw_224": _COAT,
        "coatnet_nano_rw_224": _COAT,
        "coatnet_nano_cc_224": {**_COAT, "depths": (1, 1, 2, 2)},
        "coatnext_nano_rw_224": _COAT,
        "coatnet_rmlp_nano_rw_224": {**_COAT, "transformer_rel_pos_dim": 32},
        "coatnet_rmlp_1_rw_224": {**_COAT, "transformer_rel_pos_dim": 32},
        "coatnet_0_224": {**_COAT, "stem_width": 32, "head_hidden_size": 64},
        "maxvit_pico_rw_256": _TINY,
        "maxvit_rmlp_pico_rw_256": {**_TINY, "transformer_rel_pos_dim": 32},
        "maxvit_tiny_tf_224": {**_TINY, "stem_width": 32, "head_hidden_size": 64},
        "maxxvit_rmlp_nano_rw_256": {**_TINY, "transformer_rel_pos_dim": 32},
        "maxxvitv2_nano_rw_256": _TINY,
        "maxvit_tiny_pm_256": {**_TINY, "embed_dim": (64, 64, 64, 64), "stem_width": (8, 64)},
    },
)
def plan_maxxvit(model: MaxxVit, ctx: Context) -> Changes:
    """Follow the map through every block as forward rounds it, then set each attention's window or partition."""
    places = _trace(model, ctx)
    partitioned = [place for place in places if _partition_layers(place.block)]
    partitions = _partitions(model, ctx, partitioned)
    for place in places:
        _check(place, partitions, ctx)
    dropped = [sum(place.dropped[axis] for place in places) for axis in (0, 1)]  # no place in a wrapper of the stem
    ctx.warn_dropped(dropped, "maps with an odd side are pooled in pairs")
    for place in places:
        if isinstance(place.block, TransformerBlock2d) and place.block.attn.rel_pos is not None:
            yield from ctx.visit(place.block.attn.rel_pos, window=place.map)
        for layer, name in _partition_layers(place.block):
            yield from ctx.visit(layer, partition=getattr(partitions, name))
    for name, value in (("img_size", ctx.new_size), ("partition_ratio", partitions.ratio)):
        if name in model.__dict__:  # not in a feature wrapper
            yield from ctx.attribute(model, **{name: value})
    yield from _record(model, ctx, partitions, partitioned)


@register(
    PartitionAttentionCl,
    PartitionAttention2d,
    ParallelPartitionAttention,
    state="partition_size; one rel_pos, two in parallel blocks",
    method="follow the partition",
)
def plan_partition_attention(layer: Partitioned, ctx: Context, *, partition: Size) -> Changes:
    """Set the window or grid size of an attention and of its position biases; parallel ones share it."""
    yield from ctx.attribute(layer, partition_size=partition)
    parallel = isinstance(layer, ParallelPartitionAttention)
    for attention in (layer.attn_block, layer.attn_grid) if parallel else (layer.attn,):
        if attention.rel_pos is not None:
            yield from ctx.visit(attention.rel_pos, window=partition)


def _partition_layers(block: Block) -> list[tuple[Partitioned, str]]:
    """Return a block's partition attentions with the option that sets each; none for other blocks."""
    if isinstance(block, ParallelMaxxVitBlock):
        return [(block.attn, "window_size")]
    if isinstance(block, MaxxVitBlock):
        both = ((block.attn_block, "window_size"), (block.attn_grid, "grid_size"))
        return [(layer, name) for layer, name in both if layer is not None]
    return []


@dataclass(frozen=True)
class _Place:
    """A block and the maps (h, w) that forward gives it: coming in, after its main branch, after its shortcut."""

    block: Block
    stage: int
    before: Size
    map: Size
    shortcut: Size

    @property
    def dropped(self) -> Size:
        """Rows and columns of pixels that pooling in pairs leaves out; a map before stage n has stride 2**n."""
        if self.map == self.before:
            return 0, 0
        rows, columns = (max(b - 2 * m, 0) * 2**self.stage for b, m in zip(self.before, self.map, strict=True))
        return rows, columns


def _trace(model: nn.Module, ctx: Context) -> list[_Place]:
    """Return every block with its maps; refuse a size whose map vanishes."""
    size, places = map_size(model.get_submodule("stem"), ctx.new_size), list[_Place]()
    for stage, module in enumerate(ctx.sequence(model, "stages"), 1):
        for block in module.blocks:
            place = _Place(block, stage, size, *_branches(block, size))
            if min(place.map + place.shortcut) < 1:
                ctx.invalid(f"leaves nothing of a {text(size)} map in stage {stage}")
            places.append(place)
            size = place.map
    return places


def _branches(block: Block, size: Size) -> tuple[Size, Size]:
    """Return the maps that a block's main branch and its shortcut give.

    Padded convolutions round up and unpadded pooling rounds down, so for an odd map the two may differ.
    """
    conv = getattr(block, "conv", block)  # MaxViT: convolutions first, then attention at their size
    steps: Sequence[Block] = list(conv) if isinstance(conv, nn.Sequential) else [conv]
    shortcut = size
    for step in steps:
        shortcut = map_size(step.shortcut, size)
        for name, child in parts(step):
            if name != "shortcut":
                size = map_size(child, size)
        if shortcut != size:
            break
    return size, shortcut


@dataclass(frozen=True)
class _Partitions:
    """Window (block) and grid partition sizes (h, w), and the ratio that derives them from the image."""

    window_size: Size
    grid_size: Size
    ratio: int


def _partitions(model: nn.Module, ctx: Context, places: list[_Place]) -> _Partitions:
    """Choose the partitions: as asked, else by policy; stock derives them from the image."""
    present, ratio = _present(places), _ratio(model, ctx)
    window = grid = floor_div(ctx.new_size, ratio)
    if present and (ctx.request.window_policy == "keep" or _fixed(model, ctx, *present)):
        window, grid = present
    asked, asked_grid = _asked(ctx, "window_size"), _asked(ctx, "grid_size")
    parallel = any(isinstance(place.block, ParallelMaxxVitBlock) for place in places)
    if parallel and asked and asked_grid and asked != asked_grid:
        owner, one = type(ctx.root).__name__, f"window_size={short(asked)}"
        raise ResizeError(f"{owner}: {one} is not grid_size={short(asked_grid)}: parallel blocks have one. Use {one}.")
    if ctx.request.constructing or parallel:  # the constructor completes one by the other, parallel blocks need it
        asked, asked_grid = asked or (asked_grid if parallel else None), asked_grid or asked
    if not places and any(name in ctx.request.options for name in OPTIONS):
        ctx.note("This model has no window or grid partition: it attends over whole maps.")
    out = _Partitions(asked or window, asked_grid or grid, ratio)
    if places and min(out.window_size + out.grid_size) < 1:
        ctx.invalid(f"is smaller than partition_ratio={ratio}")
    return out


def _present(places: list[_Place]) -> tuple[Size, Size] | None:
    """Return the window and grid size that the blocks have now; where there is only one, twice that."""
    have = {name: layer.partition_size for place in places for layer, name in _partition_layers(place.block)}
    names = [name if name in have else next(iter(have)) for name in ("window_size", "grid_size") if have]
    return (have[names[0]], have[names[1]]) if have else None


def _fixed(model: nn.Module, ctx: Context, window: Size, grid: Size) -> bool:
    """Whether the constructor was given a window, which it then keeps at every image size."""
    size = getattr(model, "img_size", ctx.old_size)
    if not ctx.request.constructing or ctx.request.window_policy != "timm" or size is None:
        return False
    derived = floor_div(size, _own_ratio(model))
    return (window, grid) != (derived, derived)


def _asked(ctx: Context, name: str) -> Size | None:
    """Return an option under the name that `set_input_size` has for it, or the constructor."""
    return ctx.size_option(name) or ctx.size_option(f"transformer_{name}")


def _ratio(model: nn.Module, ctx: Context) -> int:
    asked = ctx.option("partition_ratio", ctx.option("transformer_partition_ratio"))
    if asked is None:
        return _own_ratio(model)
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        owner = type(ctx.root).__name__
        raise ResizeError(f"{owner}: partition_ratio={asked!r} is not a positive int. Use partition_ratio=32.")
    return asked


def _own_ratio(model: nn.Module) -> int:
    """Return the model's ratio; a feature wrapper has it only if it was recorded."""
    recorded = getattr(model, "_model_args", {}).get("transformer_partition_ratio") or PARTITION_RATIO
    return int(getattr(model, "partition_ratio", recorded))


def _check(place: _Place, partitions: _Partitions, ctx: Context) -> None:
    """Refuse a map that does not divide into its partitions, and branches of different sizes."""
    for _, name in _partition_layers(place.block):
        part = getattr(partitions, name)
        if not divisible(place.map, part):
            ctx.invalid(f"gives a {text(place.map)} stage-{place.stage} grid, not divisible by {name}={short(part)}")
    if place.shortcut != place.map:
        ctx.invalid(
            f"gives an odd {text(place.before)} map before stage {place.stage}, whose two branches then "
            f"differ: {text(place.map)} and {text(place.shortcut)}"
        )


def _record(model: nn.Module, ctx: Context, partitions: _Partitions, places: list[_Place]) -> Changes:
    """Note the constructor arguments that give these partitions, as stock's `set_input_size` does.

    Constructing, only where the image size alone would not give them to a stock rebuild.
    """
    window, grid, ratio = partitions.window_size, partitions.grid_size, partitions.ratio
    values: dict[str, Size | int] = {
        "transformer_window_size": window,
        "transformer_grid_size": grid,
        "transformer_partition_ratio": ratio,
    }
    if not ctx.request.constructing:
        ctx.record(built=False, **values)
        return
    default = floor_div(ctx.new_size, PARTITION_RATIO)
    as_built = getattr(model, "img_size", ctx.old_size) == ctx.new_size and _present(places) == (window, grid)
    if places and not as_built and (window, grid, ratio) != (default, default, PARTITION_RATIO):
        yield from ctx.attribute(model, _model_args={**getattr(model, "_model_args", {}), **values})
