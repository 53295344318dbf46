"""Tables over the relative positions of a window's cells, and the index into them."""

from __future__ import annotations

import torch
from timm.layers import RelPosBias
from torch import Tensor

from timm_resize.core.context import Changes, Context, Rebuild
from timm_resize.geometry import Size

TOKEN_ROWS = 3
"""Last rows of a table, where there is a class token: token to patch, patch to token, token to itself."""


def resize_bias_table(
    owner: RelPosBias,
    ctx: Context,
    window: Size,
    *,
    class_token: bool = False,
    mode: str = "geometric",
    antialias: bool = True,
) -> Changes:
    """Resample the `relative_position_bias_table` (rows, heads) of a window, rebuild its index, set what records both.

    Args:
        owner: A `RelPosBias`, or a class with the same names for table, index, and the window that they are for.
        window: Window (h, w) wanted.
        class_token: Whether the last three rows are a class token's, which are kept.
        mode: The family's interpolation.
        antialias: Likewise.
    """
    if tuple(owner.window_size) == window:
        return
    suffix, heads = TOKEN_ROWS if class_token else 0, owner.relative_position_bias_table.shape[-1]
    how = ctx.rel_pos_table(tuple(owner.window_size), window, suffix=suffix, mode=mode, antialias=antialias)
    yield from ctx.parameter(owner, "relative_position_bias_table", how)
    if hasattr(owner, "relative_position_index"):  # some make it in each forward
        yield from rebuild_index(owner, ctx, window, class_token=class_token)
    area, tokens = window[0] * window[1], window[0] * window[1] + class_token
    records = {
        "window_size": window,
        "window_area": area,
        "bias_shape": (tokens, tokens, heads),
        "num_relative_distance": (2 * window[0] - 1) * (2 * window[1] - 1) + suffix,
    }
    yield from ctx.attribute(owner, **{name: value for name, value in records.items() if hasattr(owner, name)})


def rebuild_index(owner: RelPosBias, ctx: Context, window: Size, *, class_token: bool = False) -> Changes:
    """Rebuild `relative_position_index` for a window (h, w), flat where it is flat now."""
    tokens, flat = window[0] * window[1] + class_token, owner.relative_position_index.dim() == 1
    rule = Rebuild(relative_position_index, (window, class_token, flat))
    yield from ctx.buffer(owner, "relative_position_index", (tokens**2,) if flat else (tokens, tokens), rule)


def relative_position_index(
    window: Size, class_token: bool = False, flat: bool = False, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return for each pair of cells (area, area) the row of a table over offsets, row-major.

    A class token comes before the cells; its rows come after those of the offsets, in timm's order.

    Source: Swin, arXiv 2103.14030, section 3.2, equation 4 (the bias table of offsets).

    Example:
        >>> relative_position_index((1, 2), device="cpu", dtype=torch.long)
        tensor([[1, 0],
                [2, 1]])
    """
    rows, columns = (torch.arange(side, device=device, dtype=dtype) for side in window)
    down = rows[:, None] - rows[None, :] + window[0] - 1
    right = columns[:, None] - columns[None, :] + window[1] - 1
    cells = down[:, None, :, None] * (2 * window[1] - 1) + right[None, :, None, :]
    cells = cells.reshape(window[0] * window[1], -1)
    if class_token:
        pairs, offsets = cells.new_empty(len(cells) + 1, len(cells) + 1), (2 * window[0] - 1) * (2 * window[1] - 1)
        pairs[0, :] = offsets  # class token to patch
        pairs[:, 0] = offsets + 1  # patch to class token
        pairs[0, 0] = offsets + 2
        pairs[1:, 1:] = cells
        cells = pairs
    return cells.reshape(-1) if flat else cells
