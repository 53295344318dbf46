"""PiT: a position map over patches that overlap, followed by pooling that follows any map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from timm.models.pit import PoolingVisionTransformer
from torch import Tensor

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.handlers.layers.conv_size import map_size
from timm_resize.resample import AxisMap, Resample
from timm_resize.resample.sampling import sample_matrix


@register(
    PoolingVisionTransformer,
    state="pos_embed (1, dim, h, w)",
    method="bicubic antialias at the centres of the overlapping patches",
    sizes="at least one patch; pixels past the last patch are dropped, with a warning",
    guarded=True,
    examples={
        "pit_ti_224": {"depth": (1, 1, 1)},
        "pit_ti_distilled_224": {"depth": (1, 1, 1)},
        "pit_b_224": {"depth": (1, 1, 1), "base_dims": (8, 8, 8), "heads": (2, 4, 8)},
    },
)
def plan_pit(model: PoolingVisionTransformer, ctx: Context) -> Changes:
    """Resample the position map; class and distillation tokens have no position."""
    embed = model.patch_embed
    conv, patch, stride = embed.conv, tuple(embed.patch_size), embed.conv.stride
    grid = map_size(conv, ctx.new_size)
    if min(grid) < 1:
        ctx.invalid(f"is smaller than patch_size={patch[0]}")
    rest = [(side - p) % s for side, p, s in zip(ctx.new_size, patch, stride, strict=True)]
    ctx.warn_dropped(rest, f"patch_size={patch[0]} at every {stride[0]} pixels")
    options = ctx.interpolation()
    axes = tuple(
        PatchCentre(
            model.pos_embed.shape[2 + i],
            grid[i],
            int(embed.img_size[i]),
            ctx.new_size[i],
            (patch[i] / 2 - conv.padding[i]) / stride[i],
            **options,
        )
        for i in range(2)
    )
    yield from ctx.parameter(model, "pos_embed", Resample(axes, dim=2))
    yield from ctx.guard(conv, partial(map_size, conv))
    yield from ctx.attribute(embed, img_size=ctx.new_size, height=grid[0], width=grid[1], grid_size=grid)


@dataclass(frozen=True)
class PatchCentre(AxisMap):
    """Samples at the centres of patches that overlap: a place is kept as a share of the image.

    Patch i of an axis is centred at (i + centre) * stride pixels, so patch i' of the new image lies where patch
    (i' + centre) * old_side / new_side - centre of the old one does. Where patches do not overlap, centre is 1/2 and
    this is plain interpolation.

    Attributes:
        old_side: Side of the old image in pixels.
        new_side: Side of the new image in pixels.
        centre: Centre of the first patch in units of the stride.
    """

    OLD_SIDE = ("old", "old_side")

    old_side: int
    new_side: int
    centre: float
    mode: str = "bicubic"
    antialias: bool = True

    @property
    def is_identity(self) -> bool:
        """Whether the image keeps its side."""
        return self.old == self.new and self.old_side == self.new_side

    def build(self) -> Tensor:
        """Return the (new, old) matrix, float64."""
        scale = self.old_side / self.new_side
        positions = (torch.arange(self.new, dtype=torch.float64) + self.centre) * scale - self.centre
        return sample_matrix(positions, self.old, spacing=scale, mode=self.mode, antialias=self.antialias)

    @property
    def label(self) -> str:
        """Short name of the method for tables."""
        return f"{self.mode}{' antialias' if self.antialias else ''} at patch centres"
