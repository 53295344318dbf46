"""ConViT: a position embedding over the patches, and the relative positions that its gated attention reads."""

from __future__ import annotations

import torch
from timm.models.convit import GPSA, ConVit
from torch import Tensor

from timm_resize.core.context import Changes, Context, Rebuild
from timm_resize.core.registry import register
from timm_resize.geometry import Size
from timm_resize.handlers.layers.patch_embed import SIZES, plan_grids


@register(
    ConVit,
    state="pos_embed (1, h*w, dim), no prefix; rel_indices (1, h*w, h*w, 3)",
    method="bicubic antialias; indices rebuilt",
    sizes=SIZES,
    options=("patch_size",),
    examples={"convit_tiny": {"depth": 2, "local_up_to_layer": 1}},
)
def plan_convit(model: ConVit, ctx: Context) -> Changes:
    """Resample the position embedding and rebuild the relative positions of the blocks with gated attention."""
    grids = yield from plan_grids(model, model.patch_embed, ctx)
    old, new = grids.old, grids.new
    yield from ctx.parameter(model, "pos_embed", ctx.pos_embed(old, new))
    for block in model.blocks:
        if isinstance(block.attn, GPSA):
            yield from ctx.visit(block.attn, old=old, new=new)
    yield from ctx.attribute(model, num_patches=new[0] * new[1])


@register(GPSA, state="rel_indices (1, h*w, h*w, 3)", method="rebuilt")
def plan_gpsa(attn: GPSA, ctx: Context, *, old: Size, new: Size) -> Changes:
    """Rebuild the relative positions for the true grid.

    The constructor leaves a placeholder of one token, and forward builds the real ones for a square of ⌊√N⌋
    whenever the buffer's N is not the input's. With N right it reads what is there, so a buffer made here stays,
    also for a grid that is not square. A resize leaves the placeholder of a square grid to forward, as stock does.
    """
    tokens, old_tokens = new[0] * new[1], old[0] * old[1]
    placeholder = attn.rel_indices is None or attn.rel_indices.shape[1] != old_tokens
    if placeholder and new[0] == new[1]:
        return
    if placeholder or old != new:
        rule = Rebuild(relative_positions, (new,), like="qk.weight")
        yield from ctx.buffer(attn, "rel_indices", (1, tokens, tokens, 3), rule)


def relative_positions(grid: Size, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (dx, dy, dx² + dy²) from every patch to every other, in patches: (1, h*w, h*w, 3).

    Source: ConViT, arXiv 2103.10697, equation 6 (the relative positional encodings r).
    """
    sides = [torch.arange(side, dtype=torch.float32, device=device) for side in grid]
    y, x = (cells.reshape(-1) for cells in torch.meshgrid(*sides, indexing="ij"))
    dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]  # (from, to)
    return torch.stack([dx, dy, dx**2 + dy**2], dim=-1)[None].to(dtype)
