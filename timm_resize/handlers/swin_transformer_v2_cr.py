"""Swin Transformer v2-CR: windows that divide the patch grid, log-spaced coordinates that an MLP reads."""

from __future__ import annotations

import torch
from timm.models.swin_transformer_v2_cr import PatchEmbed, SwinTransformerV2Cr, WindowMultiHeadAttention
from torch import Tensor, nn

from timm_resize.core.context import Changes, Context, Grids, Rebuild, Returning
from timm_resize.core.registry import register
from timm_resize.geometry import Size
from timm_resize.handlers.layers.patch_embed import FLOORED, RECORDS, check_projection, plan_patch_embed
from timm_resize.handlers.layers.windows import OPTIONS, SIZES, SMALL, Windows, plan_stages, ratio_windows

DEFAULT_RATIO = 8
"""`window_ratio` of the constructor: windows are an eighth of the patch grid."""


@register(PatchEmbed, state=RECORDS, sizes=FLOORED)
def plan_patch_embed_cr(embed: PatchEmbed, ctx: Context) -> Returning[Grids]:
    """Set the sizes, as for timm's `PatchEmbed`, whose attributes this one has."""
    check_projection(embed, ctx, ctx.new_size)
    return (yield from plan_patch_embed(embed, ctx))


@register(
    WindowMultiHeadAttention, state="relative_coordinates_log (area*area, 2)", method="rebuilt", sizes="any window"
)
def plan_window_attention_cr(attn: WindowMultiHeadAttention, ctx: Context, *, window_size: Size) -> Changes:
    """Rebuild the coordinates for the new window; they are in cells, so larger windows extrapolate."""
    if tuple(attn.window_size) != window_size:
        area = window_size[0] * window_size[1]
        yield from ctx.buffer(
            attn, "relative_coordinates_log", (area * area, 2), Rebuild(log_offsets, (window_size,), like="logit_scale")
        )
        yield from ctx.attribute(attn, window_size=window_size)


def log_offsets(window: Size, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return sign(d)·log(1 + |d|) of the offset between each pair of cells, (area*area, 2), computed in float32.

    Source: Swin v2, arXiv 2111.09883, section 3.3, equation 4.
    """
    sides = [torch.arange(side, device=device, dtype=torch.float32) for side in window]
    cells = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).reshape(-1, 2)  # (area, 2), row-major
    offsets = (cells[:, None] - cells[None]).reshape(-1, 2)
    return (torch.sign(offsets) * torch.log(1.0 + offsets.abs())).to(dtype)


@register(
    SwinTransformerV2Cr,
    state="coordinates and masks per window",
    method="rebuilt; window_policy timm: windows scale with the grid",
    sizes=SIZES,
    options=OPTIONS,
    examples={
        "swinv2_cr_tiny_224": {**SMALL, "depths": (2, 2, 2, 2)},
        "swinv2_cr_tiny_ns_224": {**SMALL, "depths": (1, 1, 2, 2)},
    },
)
def plan_swin_transformer_v2_cr(model: SwinTransformerV2Cr, ctx: Context) -> Changes:
    """Choose each stage's window on the new grid and rebuild what depends on it."""
    grids = yield from ctx.visit(model.patch_embed, Grids)
    windows = yield from plan_stages(model, ctx, ctx.sequence(model, "stages"), grids, _constructor_windows)
    if hasattr(model, "img_size"):  # not on a feature wrapper
        yield from ctx.attribute(model, img_size=ctx.new_size, window_size=windows[0])


def _constructor_windows(model: nn.Module, windows: Windows, old: Size, new: Size) -> Windows:
    """Return the windows that the constructor makes at a new patch grid.

    It divides the grid by `window_ratio` unless `window_size` is given, and keeps neither. `window_size` among
    the recorded arguments means given. Otherwise windows that a ratio explains came from it: from the recorded
    one, the default, or the likeliest that divides the old grid so.
    """
    recorded = {**getattr(model, "pretrained_model_args", {}), **getattr(model, "_model_args", {})}
    if recorded.get("window_size") is not None:
        return windows
    ratio = recorded.get("window_ratio") or DEFAULT_RATIO
    asked = tuple(ratio)[: len(windows)] if isinstance(ratio, (list, tuple)) else (ratio,) * len(windows)
    for ratios in (asked, tuple(_likely_ratio(old, window) for window in windows)):
        if ratio_windows(old, ratios) == windows:
            return ratio_windows(new, ratios)
    return windows


def _likely_ratio(grid: Size, window: Size) -> int:
    """Return the ratio that divides a grid into a window, a power of two where several do; 1 where none does."""
    ratios = [r for r in range(1, max(grid) + 1) if ratio_windows(grid, [r]) == (window,)]
    return next((r for r in ratios if r & (r - 1) == 0), ratios[-1] if ratios else 1)
