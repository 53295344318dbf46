"""Swin Transformer v2: no sized weights, a table of log-spaced coordinates that an MLP reads."""

from __future__ import annotations

import math

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2, WindowAttention
from torch import Tensor

from timm_resize.core.context import Changes, Context, Rebuild
from timm_resize.core.registry import register
from timm_resize.geometry import Size
from timm_resize.handlers.layers.relative_position import rebuild_index
from timm_resize.handlers.layers.windows import OPTIONS, SIZES, SMALL
from timm_resize.handlers.swin_transformer import plan_swin_transformer


@register(
    WindowAttention,
    state="relative_coords_table (1, 2h-1, 2w-1, 2), relative_position_index",
    method="rebuilt",
    sizes="any window",
)
def plan_window_attention_v2(attn: WindowAttention, ctx: Context, *, window_size: Size) -> Changes:
    """Rebuild the coordinates and the index for the new window.

    Coordinates are normalised by `pretrained_window_size`, and where that is 0 (models trained from scratch) by
    the window itself: the bias then stretches with the window, in stock timm and here.
    """
    pretrained = tuple(attn.pretrained_window_size)
    if tuple(attn.window_size) == window_size:
        return
    if pretrained[0] <= 0:
        ctx.note(
            "pretrained_window_size is 0: coordinates are normalised by the new window, so the position bias "
            "stretches with it, as in stock timm."
        )
    yield from ctx.buffer(
        attn,
        "relative_coords_table",
        (1, 2 * window_size[0] - 1, 2 * window_size[1] - 1, 2),
        Rebuild(log_coordinates, (window_size, pretrained), like="proj.weight"),
    )
    yield from rebuild_index(attn, ctx, window_size)
    yield from ctx.attribute(attn, window_size=window_size)


def log_coordinates(window: Size, pretrained: Size, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the offsets of a window (1, 2h-1, 2w-1, 2), log-spaced so that the trained window spans -1..1.

    Computed in float32. `pretrained` (0, 0) stands for the window itself.

    Source: Swin v2, arXiv 2111.09883, section 3.3, equation 4; the factors 8 are the reference code's.
    """
    sides = pretrained if pretrained[0] > 0 else window
    # one scale per axis; a window of one cell has only offset 0
    rows, columns = (
        torch.arange(1 - side, side, device=device, dtype=torch.float32) / max(trained - 1, 1)
        for side, trained in zip(window, sides, strict=True)
    )
    scaled = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)[None] * 8
    return (torch.sign(scaled) * torch.log2(scaled.abs() + 1.0) / math.log2(8)).to(dtype)


register(
    SwinTransformerV2,
    state="coordinate tables, indices and masks per window",
    method="rebuilt; window_policy timm: windows scale with the grid, a new model keeps them",
    sizes=SIZES,
    options=("patch_size", *OPTIONS),
    examples={
        "swinv2_tiny_window8_256": {**SMALL, "depths": (2, 2, 2, 2)},
        "swinv2_base_window12to16_192to256": {**SMALL, "depths": (1, 1, 2, 2)},
    },
)(plan_swin_transformer)
