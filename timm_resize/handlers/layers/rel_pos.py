"""Relative position biases over one window: RelPosBias, RelPosBiasTf and RelPosMlp."""

from __future__ import annotations

import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.layers.pos_embed_rel import gen_relative_log_coords
from torch import Tensor

from timm_resize.core.context import Changes, Context, Rebuild
from timm_resize.core.registry import register
from timm_resize.geometry import Size, text
from timm_resize.handlers.layers.relative_position import rebuild_index, resize_bias_table


@register(
    RelPosBias,
    state="relative_position_bias_table ((2h-1)*(2w-1) + 3*prefix, heads), relative_position_index",
    method="table resampled (class token rows kept), index rebuilt",
)
def plan_rel_pos_bias(bias: RelPosBias, ctx: Context, *, window: Size) -> Changes:
    """Resample the flat table from the window it has to `window` (h, w); a prefix token's rows are kept."""
    yield from resize_bias_table(bias, ctx, window, class_token=bias.prefix_tokens > 0)


@register(
    RelPosBiasTf,
    state="relative_position_bias_table (heads, 2h-1, 2w-1), height_lookup, width_lookup",
    method="table resampled, lookups rebuilt",
)
def plan_rel_pos_bias_tf(bias: RelPosBiasTf, ctx: Context, *, window: Size) -> Changes:
    """Resample the table, whose two axes are apart, from the window it has to `window` (h, w)."""
    old = tuple(bias.window_size)
    if old == window:
        return
    how = ctx.rel_pos_table(old, window, dim=1, flat=False)
    yield from ctx.parameter(bias, "relative_position_bias_table", how)
    offsets = (2 * window[0] - 1, 2 * window[1] - 1)
    yield from ctx.attribute(
        bias, window_size=window, window_area=window[0] * window[1], bias_shape=(bias.num_heads, *offsets)
    )
    for name, before, side in zip(("height_lookup", "width_lookup"), old, window, strict=True):
        if before != side:
            shape = (side, side, 2 * side - 1)
            yield from ctx.buffer(bias, name, shape, Rebuild(offset_lookup, (side,)))


@register(
    RelPosMlp,
    state="rel_coords_log (2h-1, 2w-1, 2), relative_position_index",
    method="rebuilt; the MLP extrapolates",
    sizes="any; in mode 'swin' windows of 2 and more",
)
def plan_rel_pos_mlp(mlp: RelPosMlp, ctx: Context, *, window: Size) -> Changes:
    """Rebuild the log-spaced coordinates and the index for `window` (h, w); no weight has a size."""
    pretrained = tuple(mlp.pretrained_window_size)
    divisor = pretrained if pretrained[0] > 0 else window
    if mlp.mode == "swin" and 1 in divisor:
        # offsets are divided by (side - 1): 0 / 0 makes every output of stock's forward NaN
        ctx.invalid(f"gives {ctx.path(mlp)} a {text(window)} window, whose coordinates divide by zero at a side of 1")
    if tuple(mlp.window_size) == window:
        return
    area = window[0] * window[1]
    yield from ctx.attribute(mlp, window_size=window, window_area=area, bias_shape=(area, area, mlp.num_heads))
    yield from rebuild_index(mlp, ctx, window)
    shape = (2 * window[0] - 1, 2 * window[1] - 1, 2)
    yield from ctx.buffer(mlp, "rel_coords_log", shape, Rebuild(log_coords, (window, pretrained, mlp.mode)))


def log_coords(window: Size, pretrained: Size, mode: str, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the log-spaced offsets (2h-1, 2w-1, 2) of a window, by stock's own function."""
    return gen_relative_log_coords(window, pretrained, mode=mode, device=device, dtype=dtype)


def offset_lookup(side: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the one-hot (query, key, offset) tensor of one axis: 1 where key - query + side - 1 == offset."""
    at = torch.arange(side, device=device)
    offset = at[None, :, None] - at[:, None, None] + side - 1  # (query, key, 1)
    return (offset == torch.arange(2 * side - 1, device=device)).to(dtype)
