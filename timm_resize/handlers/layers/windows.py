"""Shifted windows over a map, as Swin v1, v2 and v2-CR share them: each stage's window, shift and mask."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, SwinTransformerV2Stage
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock, SwinTransformerV2CrStage
from torch import Tensor, nn

from timm_resize.core.context import Changes, Context, Grids, Rebuild, Returning
from timm_resize.core.registry import register
from timm_resize.errors import InvalidSizeError
from timm_resize.geometry import Size, ceil_div, stage_sizes, text, times
from timm_resize.handlers.layers.feature_info import feature_rows

Stage: TypeAlias = SwinTransformerStage | SwinTransformerV2Stage | SwinTransformerV2CrStage

Block: TypeAlias = SwinTransformerBlock | SwinTransformerV2Block | SwinTransformerV2CrBlock

Windows = tuple[Size, ...]

ConstructorWindows = Callable[[nn.Module, Windows, Size, Size], Windows]

OPTIONS = ("window_size", "window_ratio", "always_partition")

SIZES = "at least one patch; windows that do not divide a map let shifted ones attend across the edge, with a note"

SMALL = {"embed_dim": 16, "num_heads": (1, 2, 2, 2)}
"""What makes an example of a Swin small."""


@dataclass(frozen=True)
class Placed:
    """What the handler of a block returns: the window and the shift (h, w) that it uses."""

    window: Size
    shift: Size


def plan_stages(
    model: nn.Module, ctx: Context, stages: Sequence[Stage], grids: Grids, constructor: ConstructorWindows | None = None
) -> Returning[Windows]:
    """Give every stage its map and every block its window; returns the window of each stage.

    Args:
        model: A model, or the feature wrapper that its stages were moved to.
        stages: The stages that are there.
        grids: Patch grid before and afterwards.
        constructor: What the constructor would choose, as `f(model, reference windows, reference grid, grid)`;
            None where it takes the reference windows as they are.
    """
    grid = grids.new
    reference, reference_grid = _reference(model, stages, grids.old)
    windows = _explicit_windows(model, ctx, len(stages), grid)
    replaced = True
    if windows is None:
        policy = ctx.request.window_policy
        if policy == "timm" and ctx.request.constructing:
            windows = constructor(model, reference, reference_grid, grid) if constructor else reference
        elif policy == "keep":
            windows = reference
        else:
            windows, replaced = _scaled(reference, reference_grid, grid), False
    kept = (windows, grid) if replaced else (reference, reference_grid)
    yield from _record(model, ctx, windows, kept, changed=grid != grids.old or windows != reference)
    feat = grid
    for stage, window, was in zip(stages, windows, reference, strict=True):
        before, feat = feat, ceil_div(feat, 2) if _merges(stage.downsample) else feat
        if hasattr(stage, "feat_size"):
            yield from ctx.attribute(stage, feat_size=feat)
        else:
            yield from ctx.attribute(stage, input_resolution=before, output_resolution=feat)
        yield from _plan_blocks(stage, ctx, feat, window, forgotten=max(was) < 2, replaced=replaced)
    return windows


def _merges(downsample: nn.Module) -> bool:
    """Whether a stage's first layer halves the map: an `nn.Identity` does not, whatever it is put into."""
    leaves = (module for module in downsample.modules() if not module._modules)
    return not all(isinstance(leaf, (nn.Identity, nn.Dropout)) for leaf in leaves)


def _plan_blocks(stage: Stage, ctx: Context, feat: Size, window: Size, forgotten: bool, replaced: bool) -> Changes:
    """Visit the blocks of a stage; every second one shifts by half a window.

    Stock remembers that a block shifts by its half window alone, and forgets it for a window of one cell
    (`forgotten`): such a model never shifts again. The block's place in the stage still tells.
    """
    for index, block in enumerate(stage.blocks):
        shifts = index % 2 == 1 and (ctx.request.constructing or forgotten)
        shifts = shifts or (not ctx.request.constructing and any(block.target_shift_size))
        target = (window[0] // 2, window[1] // 2) if shifts else (0, 0)
        if ctx.request.constructing or (forgotten and replaced):
            yield from ctx.attribute(block, target_shift_size=target)
        placed = yield from ctx.visit(block, Placed, feat_size=feat, window_size=window, shift_size=target)
        if wraps(feat, placed.window, placed.shift):
            ctx.note(
                f"{ctx.path(stage)}: window_size={placed.window} does not divide the {text(feat)} map, so shifted "
                "windows attend across the image's edge (as in stock timm, which rolls before it pads). "
                f"{_dividing(feat)}"
            )


@register(
    SwinTransformerBlock,
    SwinTransformerV2Block,
    SwinTransformerV2CrBlock,
    state="attn_mask (windows, area, area)",
    method="rebuilt",
    sizes="any map",
)
def plan_block(
    block: Block, ctx: Context, *, feat_size: Size, window_size: Size, shift_size: Size
) -> Returning[Placed]:
    """Set a block's map, window, shift and mask; returns the window and shift it uses.

    `window_size` and `shift_size` are what its stage asks for: unless `always_partition`, an axis whose map is no
    larger than the window gets the map as its window, and no shift.
    """
    resolution = _resolution(block)
    always = bool(ctx.option("always_partition", block.always_partition))
    window, shift = (window_size, shift_size) if always else _clip(feat_size, window_size, shift_size)
    old_map, old_window, old_shift = getattr(block, resolution), tuple(block.window_size), tuple(block.shift_size)
    yield from ctx.attribute(
        block,
        **{resolution: feat_size},
        always_partition=always,
        window_size=window,
        shift_size=shift,
        window_area=window[0] * window[1],
    )
    old = (_padded(old_map, old_window), old_window, old_shift)
    padded = _padded(feat_size, window)
    if (padded, window, shift) != old and not block.dynamic_mask:
        count, area = padded[0] * padded[1] // (window[0] * window[1]), window[0] * window[1]
        rule = Rebuild(shifted_window_mask, (padded, window, shift), like="norm1.weight")
        yield from ctx.buffer(block, "attn_mask", (count, area, area) if any(shift) else None, rule)
    yield from ctx.visit(block.attn, window_size=window)
    return Placed(window, shift)


def ratio_windows(grid: Size, ratios: Sequence[int]) -> Windows:
    """Return the patch grid divided by each stage's ratio, at least one cell.

    Example:
        >>> ratio_windows((56, 28), (8, 8, 4))
        ((7, 3), (7, 3), (14, 7))
    """
    return tuple((max(1, grid[0] // r), max(1, grid[1] // r)) for r in ratios)


def wraps(feat: Size, window: Size, shift: Size) -> bool:
    """Whether a shifted window mixes the two edges of the image unmasked.

    Rolling an axis of n cells by s puts the wrapped ones at n-s … n-1; padding then goes after them, while the
    mask marks the last s of the padded axis. That is right when no padding is needed, or when the wrapped cells
    begin a window of their own (n % window == s).
    """
    return any(s > 0 and n % w not in (0, s) for n, w, s in zip(feat, window, shift, strict=True))


def shifted_window_mask(padded: Size, window: Size, shift: Size, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the attention mask (windows, area, area): -100 between cells of different regions, else 0.

    On each axis of the rolled and padded map the last `shift` cells are a region of their own: they wrapped round.
    The paper's third region begins where the last window does, so it never parts two cells of one window.

    Source: Swin, arXiv 2103.14030, section 3.2 (efficient batch computation for shifted configuration).

    Example:
        >>> shifted_window_mask((2, 4), (2, 2), (0, 1), device="cpu", dtype=torch.float32)[1, 0]
        tensor([   0., -100.,    0., -100.])
    """
    apart = []  # of the last window of each axis, the only one with wrapped cells
    for side, by in zip(window, shift, strict=True):
        wrapped = torch.arange(side, device=device) >= side - by
        values = torch.zeros(side, side, device=device, dtype=dtype)
        apart.append(values.masked_fill_(wrapped[:, None] != wrapped[None, :], -100.0))
    rows, columns = apart[0][:, None, :, None], apart[1][None, :, None, :]
    count = padded[0] // window[0], padded[1] // window[1]
    mask = torch.zeros(*count, *window, *window, device=device, dtype=dtype)
    mask[-1], mask[:, -1], mask[-1, -1] = rows, columns, torch.minimum(rows, columns)
    return mask.reshape(count[0] * count[1], window[0] * window[1], -1)


def _explicit_windows(model: nn.Module, ctx: Context, count: int, grid: Size) -> Windows | None:
    """Return the windows of `window_size=` or else of `window_ratio=`, None when neither was given.

    Where stages were cut off, one entry for each that the whole model has is accepted too.
    """
    total = max(count, len(feature_rows(model)))
    windows, ratios = ctx.option("window_size"), ctx.option("window_ratio")
    owner = type(ctx.root).__name__
    if windows is not None:
        entries = total if isinstance(windows, (list, tuple)) and len(windows) == total else count
        return stage_sizes(windows, entries, "window_size", owner)[:count]
    if ratios is not None:
        return ratio_windows(grid, _ratios(ratios, count, total, owner))
    return None


def _ratios(value: int | list[int] | tuple[int, ...], count: int, total: int, owner: str) -> tuple[int, ...]:
    """Read an int, or one per stage; unlike `window_size`, two values are two stages."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) not in (count, total):
        raise InvalidSizeError(
            f"{owner}: window_ratio={value!r} has {len(values)} entries for {count} stages. Use one int, or {count}."
        )
    try:
        ratios = tuple(operator.index(v) for v in values)
    except TypeError:
        ratios = (0,)
    if min(ratios) < 1:
        raise InvalidSizeError(f"{owner}: window_ratio={value!r} is not made of positive integers. Use window_ratio=8.")
    return ratios[:count]


def _scaled(windows: Windows, old: Size, new: Size) -> Windows:
    """Scale windows with the patch grid, rounding down, at least one cell."""
    return tuple((max(1, h * new[0] // old[0]), max(1, w * new[1] // old[1])) for h, w in windows)


def _record(
    model: nn.Module, ctx: Context, windows: Windows, reference: tuple[Windows, Size], changed: bool
) -> Changes:
    """Set the reference that later resizes scale from, and record the windows for a rebuild of the model.

    A feature wrapper has no reference; it gets one with its first change, unless it is still being built.
    """
    if hasattr(model, "_ref_window_sizes") or (changed and not ctx.request.constructing):
        yield from ctx.attribute(model, _ref_window_sizes=reference[0], _ref_grid_size=reference[1])
    missing = max(len(feature_rows(model)) - len(windows), 0)
    always = ctx.option("always_partition")
    # the constructor wants a window for each stage, also for those that a feature extractor has cut off
    ctx.record(window_size=windows + windows[-1:] * missing, always_partition=always)


def _reference(model: nn.Module, stages: Sequence[Stage], grid: Size) -> tuple[Windows, Size]:
    """Return the windows that resizes scale from, and the patch grid they were set for."""
    windows = getattr(model, "_ref_window_sizes", None)
    if windows is not None:
        return tuple(windows)[: len(stages)], tuple(getattr(model, "_ref_grid_size", grid))
    held: list[Size] = []
    for stage in stages:
        held.append(_held_window(list(stage.blocks), held[0] if held else None))
    return tuple(held), grid


def _held_window(blocks: list[Block], first: Size | None) -> Size:
    """Return the window that a stage was built with, from what its blocks hold.

    A feature wrapper drops the model's record. A window below its map is the one; a window that spans its map
    may be a larger one clipped. Half of that is what a shifting block remembers in `target_shift_size`; of the
    two windows with that half, the `first` stage's is taken, then the one in use, then the even one. A stage
    without a shifting block is taken to be as the first.
    """
    window, shifting = tuple(blocks[0].window_size), blocks[1] if len(blocks) > 1 else None
    feat = getattr(blocks[0], _resolution(blocks[0]))
    out = []
    for axis in (0, 1):
        held, model = window[axis], first[axis] if first else 0
        choices = [model, held]
        if shifting is not None:
            half = shifting.target_shift_size[axis]
            choices = [w for w in (model, held, 2 * half) if w // 2 == half]
        clipped = held >= feat[axis] and not blocks[0].always_partition
        out.append(next((w for w in choices if w >= held), held) if clipped else held)
    return out[0], out[1]


def _resolution(block: Block) -> str:
    """Return the name of the attribute that holds a block's map."""
    return "feat_size" if hasattr(block, "feat_size") else "input_resolution"


def _clip(feat: Size, window: Size, shift: Size) -> tuple[Size, Size]:
    used = min(feat[0], window[0]), min(feat[1], window[1])
    by = (shift[0] if feat[0] > used[0] else 0), (shift[1] if feat[1] > used[1] else 0)
    return used, by


def _padded(feat: Size, window: Size) -> Size:
    return times(ceil_div(feat, window), window)


def _dividing(feat: Size) -> str:
    rows, columns = (", ".join(str(n) for n in range(min(2, side), side + 1) if side % n == 0) for side in feat)
    return f"Windows that divide: {rows}." if feat[0] == feat[1] else f"Heights that divide: {rows}; widths: {columns}."
