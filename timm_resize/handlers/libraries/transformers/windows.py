"""What Swin v1 and v2 have in common in the library: the grid that a model keeps, and the map of each stage."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, ceil_div, floor_div, short, text
from timm_resize.handlers.libraries.transformers.configs import as_pair

SIZES = "at least one patch; forward pads to whole patches and windows"


def plan_window_embeddings(embeddings: nn.Module, ctx: Context, *, prefix: int) -> Changes:
    """Set the grid of patches, rounded down as constructors do, and resample `position_embeddings`, if there are any.

    Forward pads to whole patches, for which there are no positions then.
    """
    patches = embeddings.get_submodule("patch_embeddings")
    patch, old = (as_pair(getattr(patches, name)) for name in ("patch_size", "grid_size"))
    new, padded = floor_div(ctx.new_size, patch), ceil_div(ctx.new_size, patch)
    if min(new) < 1:
        ctx.invalid(f"is smaller than patch_size={short(patch)}")
    if new != padded and embeddings.position_embeddings is not None:
        ctx.invalid(f"is padded to a {text(padded)} grid for patch_size={short(patch)}, with positions for {text(new)}")
    how = ctx.pos_embed(old, new, prefix, antialias=False)
    yield from ctx.parameter(embeddings, "position_embeddings", how, optional=True)
    yield from ctx.attribute(patches, num_patches=new[0] * new[1], grid_size=new)
    yield from ctx.attribute(embeddings, patch_grid=new)


def plan_stages(encoder: nn.Module, ctx: Context) -> Changes:
    """Set the map (h, w) that blocks and the merging of patches keep, rounded down; forward goes by what it is given.

    Returns:
        For each stage that map, the one that forward makes, rounded up, and its blocks.

    Raises:
        ResizeError: Windows are to be scaled, which are one number in a configuration here, whatever the image.
    """
    if ctx.request.window_policy == "scale":
        name = type(ctx.root).__name__
        raise ResizeError(
            f"{name}: window_policy='scale' is for timm's models: windows are config.window_size here. Leave it out.",
            model=name,
            argument="window_policy",
            value="scale",
        )
    patch = as_pair(encoder.config.patch_size)  # type: ignore[union-attr, arg-type]
    kept, made = floor_div(ctx.new_size, patch), ceil_div(ctx.new_size, patch)
    out: list[tuple[Size, Size, list[nn.Module]]] = []
    for stage in encoder.get_submodule("layers").children():
        blocks = list(stage.get_submodule("blocks").children())
        out.append((kept, made, blocks))
        for module in (*blocks, stage._modules.get("downsample")):
            if module is not None and hasattr(module, "input_resolution"):
                yield from ctx.attribute(module, input_resolution=kept)
        kept, made = floor_div(kept, 2), ceil_div(made, 2)
    return out


def shifts(window: int, blocks: list[nn.Module]) -> Iterator[tuple[nn.Module, int]]:
    """Yield each block of a stage with the shift that its configuration asks for: every other half a window."""
    for index, block in enumerate(blocks):
        yield block, window // 2 if index % 2 else 0
