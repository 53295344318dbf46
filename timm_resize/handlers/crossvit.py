"""CrossViT: two branches that each scale the image to a size of their own, cut it finer or coarser, and exchange."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from timm.models import get_pretrained_cfg
from timm.models.crossvit import CrossVit, PatchEmbed

from timm_resize.core.context import MISSING, Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size, floor_div, left_over, text, times
from timm_resize.handlers.layers.conv_size import map_size

Scales = tuple[float, ...]

_SMALL = {"depth": [[1, 1, 0]], "embed_dim": [32, 64], "num_heads": [2, 2]}


@register(
    CrossVit,
    state="pos_embed_0, pos_embed_1 (1, 1 + h*w, dim), img_size_scaled",
    method="bicubic antialias; class token kept",
    sizes="any that gives each branch a patch; only multiples of 12 reach branch 0 unscaled, others warned of",
    guarded=True,
    examples={"crossvit_9_240": _SMALL, "crossvit_9_dagger_240": _SMALL, "crossvit_15_dagger_408": _SMALL},
)
def plan_crossvit(model: CrossVit, ctx: Context) -> Changes:
    """Give each branch an image of the new size times its scale, and resample its table.

    Forward scales whatever comes to the branch sizes, so another input size alone changes nothing.
    """
    scales = branch_scales(model)
    sizes = []
    for number, (embed, scale) in enumerate(zip(model.patch_embed, scales, strict=True)):
        patch = tuple(embed.patch_size)
        if min(ctx.new_size) * scale < max(patch):
            ctx.invalid(
                f"gives branch {number} an image of {min(ctx.new_size) * scale:.1f} pixels, less than "
                f"patch_size={patch[0]}"
            )
        size = branch_size(embed, ctx.new_size, scale)
        old, new = _table_grid(model, number), floor_div(size, patch)
        rest = left_over(size, times(new, patch))
        ctx.warn_dropped(rest, f"the patches of branch {number}'s {text(size)} image take {text(patch)}")
        if not any(rest) and scale == 1 and size != ctx.new_size:
            ctx.warn(
                f"img_size={ctx.new_size} is scaled to {text(size)} in branch {number}, "
                f"whose patches take {text(patch)}."
            )
        yield from ctx.attribute(embed, img_size=size, num_patches=new[0] * new[1])
        yield from ctx.parameter(model, f"pos_embed_{number}", ctx.pos_embed(old, new, prefix=1))
        sizes.append(size)
    yield from ctx.attribute(model, img_size=ctx.new_size, img_size_scaled=sizes)
    yield from ctx.guard(model, lambda size: size)  # any other image would be scaled to this one's size
    yield from _scale_records(model, ctx, scales, sizes)


def _scale_records(model: CrossVit, ctx: Context, scales: Scales, sizes: Sequence[Size]) -> Changes:
    """Keep the scales where they cannot be read off the sizes, and record what makes stock build the sizes."""
    readable = _read_scales(model, ctx.new_size, sizes) == scales
    yield from ctx.attribute(model, img_scale=MISSING if readable else scales)
    if all(_cut(ctx.new_size, scale) == size for scale, size in zip(scales, sizes, strict=True)):
        built: Sequence[float | None] = scales
        if "img_scale" not in (getattr(model, "_model_args", None) or {}):
            return
    else:
        built = [_scale_for(ctx.new_size, size) for size in sizes]
    if None in built:
        ctx.note(
            f"stock timm has no img_scale that gives branches of {' and '.join(map(text, sizes))}: "
            "a checkpoint saved at this size needs timm_resize."
        )
        built = scales
    ctx.record(built=True, img_scale=tuple(built))


def branch_size(embed: PatchEmbed, size: Size, scale: float) -> Size:
    """Return the size of a branch's image: stock's where stock gets it right, else the nearest whole patches.

    Stock's constructor cuts the scaled size to whole pixels and counts ⌊⌊h/p⌋·w/p⌋ patches, which is what forward
    makes only where the last patch is (nearly) full.
    """
    patch, cut = tuple(embed.patch_size), _cut(size, scale)
    grid = floor_div(cut, patch)
    if grid[0] * cut[1] // patch[1] == grid[0] * grid[1] and min(grid) and map_size(embed.proj, cut) == grid:
        return cut
    height, width = (max(int(side / p + 0.5), 1) * p for side, p in zip(cut, patch, strict=True))
    return height, width


def branch_scales(model: CrossVit) -> Scales:
    """Return each branch's image scale, which stock's constructor does not keep."""
    if hasattr(model, "img_scale"):
        return tuple(model.img_scale)
    return _read_scales(model, tuple(model.img_size), [tuple(size) for size in model.img_size_scaled])


def _read_scales(model: CrossVit, img_size: Size, sizes: Sequence[Size]) -> Scales:
    """Read the scales off the branch sizes, which tell them up to rounding.

    At the architecture's own size every branch is whole patches: look for a scale that does that and leads here.
    """
    config = get_pretrained_cfg((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""), True)
    native = config.input_size[1] if config is not None else 0
    axis = int(img_size[1] > img_size[0])
    scales = []
    for embed, size in zip(model.patch_embed, sizes, strict=True):
        scale, patch = size[axis] / img_size[axis], embed.patch_size[axis]
        if native:
            patches = scale * native / patch
            whole = (ceil(patches - 1e-9) * patch / native, round(patches) * patch / native)
            scale = next((s for s in whole if size in (_cut(img_size, s), branch_size(embed, img_size, s))), scale)
        scales.append(scale)
    return tuple(scales)


def _cut(size: Size, scale: float) -> Size:
    """Scale a size as stock's constructor does."""
    return int(size[0] * scale), int(size[1] * scale)


def _scale_for(size: Size, scaled: Size) -> float | None:
    """Return a scale that stock's constructor turns into `scaled`, None if the two sides need different ones."""
    if size[0] * scaled[1] == size[1] * scaled[0] and _cut(size, scaled[0] / size[0]) == scaled:
        return scaled[0] / size[0]
    low = max(part / side for part, side in zip(scaled, size, strict=True))
    high = min((part + 1) / side for part, side in zip(scaled, size, strict=True))
    middle = (low + high) / 2
    return middle if _cut(size, middle) == scaled else None


def _table_grid(model: CrossVit, number: int) -> Size:
    """Return the grid of a branch's table.

    Where stock's constructor miscounted it, the entries are fresh noise over no grid at all; then the most nearly
    square grid of as many cells carries them.
    """
    embed, count = model.patch_embed[number], getattr(model, f"pos_embed_{number}").shape[1] - 1
    grid = floor_div(tuple(embed.img_size), tuple(embed.patch_size))
    if grid[0] * grid[1] == count:
        return grid
    side = next((d for d in range(int(count**0.5), 0, -1) if count % d == 0), 0)
    return side, count // side if side else 0
