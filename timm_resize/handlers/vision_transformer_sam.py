"""SAM's ViT: windowed blocks of a fixed window, global blocks whose relative positions span the map."""

from __future__ import annotations

from timm.models.vision_transformer_sam import Attention, Block, VisionTransformerSAM

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size
from timm_resize.handlers.layers.patch_embed import plan_grids
from timm_resize.handlers.layers.square_windows import scaled_side, square_side
from timm_resize.resample import Interpolate, Resample


@register(
    VisionTransformerSAM,
    state="pos_embed (1, h, w, dim); rel_pos_h, rel_pos_w (2*side - 1, dim) of the global blocks",
    method="bicubic antialias; offsets linear, half-pixel, as stock's forward does it; windows kept",
    sizes="multiples of the patch",
    options=("patch_size", "window_size"),
    examples={
        "samvit_base_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "global_attn_indexes": (1,)},
        "samvit_base_patch16": {
            "depth": 1,
            "embed_dim": 16,
            "num_heads": 1,
            "global_attn_indexes": (),
            "neck_chans": 16,
        },
    },
)
def plan_vision_transformer_sam(model: VisionTransformerSAM, ctx: Context) -> Changes:
    """Resample what spans the map; windowed blocks stay as they are unless `window_size` says otherwise.

    Stock's forward resamples both kinds of table whenever the map differs, by the same maps, so a resized model
    computes what the unresized one does at that size.
    """
    grids = yield from plan_grids(model, model.patch_embed, ctx)
    old, new = grids.old, grids.new
    yield from ctx.parameter(model, "pos_embed", ctx.pos_embed_map(old, new, dim=1), optional=True)
    window = _window(model, ctx, old, new)
    for block in model.blocks:
        yield from ctx.visit(block, feat_size=new, window=window)
    for rope, shape in ((model.rope_global, new), (model.rope_window, (window, window))):
        if rope is not None:
            yield from ctx.visit(rope, feat_shape=shape)
    if ctx.option("window_size") is not None or ctx.request.window_policy == "scale":
        ctx.record(window_size=window)


def _window(model: VisionTransformerSAM, ctx: Context, old: Size, new: Size) -> int:
    """Return the side of the windows; 0 for a model that has none."""
    present = max(int(block.window_size) for block in model.blocks)
    given = ctx.size_option("window_size")
    if given is not None and not present:
        raise ResizeError(
            f"{type(ctx.root).__name__}: window_size={given} is for a model with windowed blocks, and this one "
            "has none. Leave window_size out."
        )
    if given is not None:
        return square_side(given, ctx)
    return scaled_side(present, old, new) if present and ctx.request.window_policy == "scale" else present


@register(Block, state="window_size")
def plan_block(block: Block, ctx: Context, *, feat_size: Size, window: int) -> Changes:
    """Give a windowed block windows of side `window`, a global one tables for the whole map `feat_size`."""
    if block.window_size > 0:
        yield from ctx.attribute(block, window_size=window)
        feat_size = (window, window)
    yield from ctx.visit(block.attn, feat_size=feat_size)


@register(Attention, state="rel_pos_h, rel_pos_w (2*side - 1, dim)", method="linear, half-pixel")
def plan_attention(attention: Attention, ctx: Context, *, feat_size: Size) -> Changes:
    """Resample both tables of relative positions for attention over a map of `feat_size`."""
    if not attention.use_rel_pos:
        return
    for name, side in zip(("rel_pos_h", "rel_pos_w"), feat_size, strict=True):
        rows = int(getattr(attention, name).shape[0])
        how = Interpolate(rows, 2 * side - 1, **ctx.interpolation(mode="bilinear", antialias=False))
        yield from ctx.parameter(attention, name, Resample((how,)))
