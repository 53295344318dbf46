"""ResNet and its relatives: nothing depends on the size, but antialiased ones need maps that halve evenly."""

from __future__ import annotations

import torch
from timm.models.resnet import ResNet
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.copies import meta_copy
from timm_resize.core.registry import register
from timm_resize.geometry import Size


@register(
    ResNet,
    sizes="any; with average-pool antialiasing the stem's map % 8; with blur pooling from 17",
    examples={"resnet18": {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}},
)
def plan_resnet(model: ResNet, ctx: Context) -> Changes:
    """Check what the pools of antialiased variants can take.

    With `aa_layer` an average pool, a block's main branch floors where its shortcut rounds up, so a stage must
    not meet an odd map. A blur pool pads by reflection, which needs two cells.
    """
    pools = [m for m in model.modules() if type(m).__name__ in ("BlurPool2d", "AvgPool2d")]
    blocks = [m for name, m in model.named_modules() if name.endswith("aa") and not isinstance(m, nn.Identity)]
    if any(isinstance(m, nn.AvgPool2d) for m in blocks):
        size = _stem_size(model, ctx)
        if size[0] % 8 or size[1] % 8 or min(size) < 8:
            ctx.invalid(
                f"gives a {size[0]}x{size[1]} map after the stem, not divisible by 8: average-pool "
                "antialiasing halves it three times"
            )
    elif blocks and pools and min(ctx.new_size) < 17:
        ctx.invalid("is below the minimum of 17 for blur pooling")
    yield from ()


def _stem_size(model: nn.Module, ctx: Context) -> Size:
    """Return (h, w) after the stem, by running it on the meta device; also where a wrapper flattened it."""
    stem = []
    for name, module in model.named_children():
        if name.startswith("layer"):
            break
        stem.append(meta_copy(module))
    x = torch.empty(1, stem_channels(stem), *ctx.new_size, device="meta")
    try:
        with torch.no_grad():
            out = nn.Sequential(*stem).eval()(x)
    except RuntimeError:
        ctx.invalid("is too small for the stem")
    return int(out.shape[2]), int(out.shape[3])


def stem_channels(stem: list[nn.Module]) -> int:
    """Return the input channels of the first convolution."""
    return next(m.in_channels for part in stem for m in part.modules() if isinstance(m, nn.Conv2d))
