"""Tables over the relative positions of a window's cells, and the index into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timm_resize.geometry import Size
from timm_resize.resample import serial


def relative_position_index(window: Size, class_token: bool = False, *, device: Any, dtype: Any) -> Tensor:
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
    cells = serial.added(down[:, None, :, None] * (2 * window[1] - 1), right[None, :, None, :])
    cells = cells.reshape(window[0] * window[1], -1)
    if not class_token:
        return cells
    index, offsets = cells.new_empty(len(cells) + 1, len(cells) + 1), (2 * window[0] - 1) * (2 * window[1] - 1)
    index[0, :] = offsets  # class token to patch
    index[:, 0] = offsets + 1  # patch to class token
    index[0, 0] = offsets + 2
    serial.copy_(index[1:, 1:], cells)
    return index
