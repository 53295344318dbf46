"""torchvision's ViT: vit_b_16 to vit_h_14, also with a convolutional stem or a layer before the classifier."""

from __future__ import annotations

from torchvision.models.vision_transformer import VisionTransformer

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size, divisible, floor_div, text
from timm_resize.handlers.layers.conv_size import map_size


def image_size(model: VisionTransformer) -> Size:
    """Return the size (H, W), always a square."""
    return model.image_size, model.image_size


@register(
    VisionTransformer,
    state="encoder.pos_embedding (1, 1 + h*w, dim)",
    method="bicubic, corner to corner; class token kept",
    sizes="squares that the patch divides, as forward checks",
    size=image_size,
)
def plan_vision_transformer(model: VisionTransformer, ctx: Context) -> Changes:
    """Resample the position embedding as torchvision's own `interpolate_embeddings` does, unless asked otherwise.

    That is bicubic without antialias, the corners of the grid kept. Forward compares both sides with one `image_size`.

    Source: torchvision/models/vision_transformer.py, interpolate_embeddings.
    """
    size, patch = ctx.new_size, model.patch_size
    if size[0] != size[1]:
        ctx.invalid("is not a square, the only shape that torchvision's forward takes")
    if not divisible(size, patch):
        ctx.invalid(f"is not divisible by patch_size={patch}")
    old, new = floor_div(image_size(model), patch), floor_div(size, patch)
    made = map_size(model.conv_proj, size)
    if made != new:
        ctx.invalid(f"gives a {text(made)} map after the stem, and patch_size={patch} counts {text(new)}")
    how = ctx.pos_embed(old, new, prefix=1, antialias=False, align_corners=True)
    yield from ctx.parameter(model.encoder, "pos_embedding", how)
    yield from ctx.attribute(model, image_size=size[0], seq_length=1 + new[0] * new[1])
