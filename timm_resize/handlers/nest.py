"""NesT: attention within a fixed number of blocks per level, whose size follows the image."""

from __future__ import annotations

from math import isqrt

import torch
from timm.models._manipulate import checkpoint_seq
from timm.models.nest import Nest, NestLevel
from torch import Tensor

from timm_resize.core.context import Changes, Context, Grids
from timm_resize.core.registry import register
from timm_resize.errors import UnsupportedModelError
from timm_resize.geometry import Size, divisible, floor_div, text, times
from timm_resize.resample.blocked import Blocked


@register(
    Nest,
    state="pos_embed (1, blocks, h*w, dim) per level",
    method="bicubic over the levels' whole maps, cut into the same number of blocks again",
    sizes="a patch grid that divides into the first level's blocks (16 pixels), square or not",
    examples={"nest_tiny": {"mlp_ratio": 0.5}, "nest_tiny_jx": {"mlp_ratio": 0.5}},
)
def plan_nest(model: Nest, ctx: Context) -> Changes:
    """Keep the hierarchy of blocks and change their size."""
    grid = (yield from ctx.visit(model.patch_embed, Grids)).new
    levels = ctx.sequence(model, "levels")
    blocks = _blocks(levels[0])
    if not divisible(grid, blocks):
        ctx.invalid(f"gives a {text(grid)} patch grid, not divisible into {blocks}x{blocks} blocks")
    block = floor_div(grid, blocks)
    for level in levels:
        yield from ctx.visit(level, block=block)
    if "block_size" in model.__dict__:  # not in a feature wrapper
        cells = grid[0] * grid[1]
        yield from ctx.attribute(model, block_size=_stored(block), num_patches=cells, seq_length=block[0] * block[1])


@register(NestLevel, state="pos_embed (1, blocks, h*w, dim), block_size", method="bicubic over the whole map")
def plan_nest_level(level: NestLevel, ctx: Context, *, block: Size) -> Changes:
    """Give the level blocks of `block` (h, w) cells; where they are not square, a forward that knows both sides."""
    old = level.block_size
    old = (old, old) if isinstance(old, int) else tuple(old)
    blocks = _blocks(level)
    how = ctx.pos_embed_map(times(old, blocks), times(block, blocks), dim=1, antialias=False)
    yield from ctx.parameter(level, "pos_embed", Blocked(how.axes, dim=1, blocks=blocks))
    yield from ctx.attribute(level, block_size=_stored(block))
    wanted = NestLevel if block[0] == block[1] else RectangularNestLevel
    if isinstance(level, RectangularNestLevel) != (wanted is RectangularNestLevel):
        if type(level) not in (NestLevel, RectangularNestLevel):
            raise UnsupportedModelError(
                f"{type(ctx.root).__name__}: {ctx.path(level)} is a {type(level).__name__}, whose forward may know "
                "square blocks only. Use a square img_size, or register a handler for it."
            )
        yield from ctx.attribute(level, **{"__class__": wanted})


def _blocks(level: NestLevel) -> int:
    """Return the blocks per side: as many down as across, at every image size."""
    return isqrt(int(level.pos_embed.shape[1]))


def _stored(block: Size) -> int | Size:
    """Return a block's size as stock stores it, one side; as a pair where that cannot say it."""
    return block[0] if block[0] == block[1] else block


class RectangularNestLevel(NestLevel):
    """A level whose blocks are not square: `block_size` is (h, w). Stock's forward has one side for both axes."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, dim, h, w) as `NestLevel` does."""
        x = self.pool(x).permute(0, 2, 3, 1)
        batch, height, width, dim = x.shape
        h, w = self.block_size
        down, across = height // h, width // w
        x = x.reshape(batch, down, h, across, w, dim).transpose(2, 3).reshape(batch, down * across, h * w, dim)
        x = x + self.pos_embed
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.transformer_encoder, x)
        else:
            x = self.transformer_encoder(x)
        x = x.reshape(batch, down, across, h, w, dim).transpose(2, 3).reshape(batch, height, width, dim)
        return x.permute(0, 3, 1, 2)
