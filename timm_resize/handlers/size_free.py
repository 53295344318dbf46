"""Models in which nothing depends on the image size: one table, class of `timm.models` → sizes its forward takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile

import torch
from timm import models
from torch import Tensor, nn

from timm_resize.core.context import SIZE_ERRORS, Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import ceil_div, divisible, text
from timm_resize.handlers.layers.conv_size import parts

SMALLEST_SURE = 64
"""Pixels of a side from which on every `forward` rule holds without a try."""


def check_size(ctx: Context, *, minimum: int = 1, multiple: int = 1, why: str = "") -> None:
    """Refuse a size with a side below `minimum` or not divisible by `multiple` (pixels)."""
    if min(ctx.new_size) < minimum:
        ctx.invalid(f"is below the minimum of {minimum}")
    if not divisible(ctx.new_size, multiple):
        ctx.invalid(f"is not divisible by {multiple}{', ' + why if why else ''}")


def check_forward(model: nn.Module, ctx: Context) -> None:
    """Refuse a small size that the model's own forward cannot take, or only with an empty map on the way.

    Run on the meta device, so no value is computed; strides, kernels and halvings decide, not a list of minima.
    """
    if model is not ctx.root or min(ctx.new_size) >= SMALLEST_SURE:
        return
    copy, empty = ctx.meta_copy(model), list[str]()

    def note_empty(module: nn.Module, args: object, out: object) -> None:
        if isinstance(out, Tensor) and out.numel() == 0:
            empty.append(type(module).__name__)

    hooks = [module.register_forward_hook(note_empty) for module in copy.modules()]
    channels = getattr(model, "in_chans", None) or _first_conv(copy).in_channels
    try:
        with torch.no_grad():
            copy(torch.empty(1, channels, *ctx.new_size, device="meta", dtype=next(copy.parameters()).dtype))
    except torch.cuda.OutOfMemoryError:  # says nothing of the size
        raise
    except SIZE_ERRORS:
        empty.append("")
    finally:
        for hook in hooks:
            hook.remove()
    if empty:
        ctx.invalid("does not come out even, or at all, after the strides of the model")


def _first_conv(*parts: nn.Module) -> nn.Conv2d:
    return next(m for part in parts for m in part.modules() if isinstance(m, nn.Conv2d))


@dataclass(frozen=True)
class Rule:
    """Which sizes a model takes.

    Attributes:
        sizes: The same in words, for the table of families.
        minimum: Least pixels of a side.
        multiple: What the sides are multiples of, in pixels.
        why: What needs the multiple.
        stride: Stride of a map, rounded up, that must be whole `cells`.
        cells: What the sides of that map are multiples of.
        forward: Whether small sizes are what forward takes, by a try without values.
    """

    sizes: str
    minimum: int = 1
    multiple: int = 1
    why: str = ""
    stride: int = 1
    cells: int = 1
    forward: bool = False

    def check(self, model: nn.Module, ctx: Context) -> None:
        """Refuse a size that the rule excludes."""
        check_size(ctx, minimum=self.minimum, multiple=self.multiple, why=self.why)
        size = ceil_div(ctx.new_size, self.stride)
        if not divisible(size, self.cells):
            ctx.invalid(f"gives a {text(size)} map at stride {self.stride}, not divisible by {self.cells}")
        if self.forward:
            check_forward(model, ctx)


ANY = Rule("any")
SMALL = Rule("any that leaves a cell after the strides (at most 33)", forward=True)
FROM_32 = Rule("at least 32", minimum=32)
FROM_75 = Rule("at least 75", minimum=75)
QUARTERED = Rule("⌈side / 4⌉ % 8", stride=4, cells=8)

RULES: Mapping[str, Rule] = {
    "ConvMixer": SMALL,
    "ConvNeXt": SMALL,
    "CPUBone": ANY,
    "CSATv2": Rule("multiples of 8, at least 64", minimum=64, multiple=8, why="the block of the cosine transform"),
    "CspNet": SMALL,
    "CspNext": ANY,
    "DaVit": ANY,
    "DenseNet": SMALL,
    "DLA": Rule("⌈side / 2⌉ % 16", stride=2, cells=16),
    "DPN": ANY,
    "EdgeNeXt": SMALL,
    "EfficientNet": ANY,
    "EfficientNetFeatures": SMALL,
    "EfficientViM": ANY,
    "EfficientVit": ANY,
    "EfficientVitLarge": ANY,
    "FasterNet": FROM_32,
    "FastVit": ANY,
    "FocalNet": SMALL,
    "GhostNet": SMALL,
    "hieradet_sam2.HieraDet": QUARTERED,
    "HighPerfGpuNet": ANY,
    "HighResolutionNet": QUARTERED,
    "IFormer": ANY,
    "InceptionResnetV2": FROM_75,
    "InceptionV3": FROM_75,
    "InceptionV4": FROM_75,
    "LCNetV2": ANY,
    "LowFormer": ANY,
    "mambaout.MambaOut": ANY,
    "MetaFormer": SMALL,
    "MetaNeXt": FROM_32,
    "MobileNetV3": SMALL,
    "MobileNetV3Features": SMALL,
    "MobileNetV5": ANY,
    "MobileNetV5Encoder": ANY,
    "NASNetALarge": SMALL,
    "NextViT": SMALL,
    "NormFreeNet": ANY,
    "PNASNet5Large": SMALL,
    "PyramidVisionTransformerV2": SMALL,
    "RDNet": FROM_32,
    "RegNet": ANY,
    "RepGhostNet": ANY,
    "RepVit": ANY,
    "ResNetV2": SMALL,
    "RexNet": ANY,
    "SelecSls": ANY,
    "SENet": SMALL,
    "Sequencer2d": SMALL,
    "SHViT": ANY,
    "StarNet": ANY,
    "SwiftFormer": ANY,
    "TResNet": Rule("multiples of 4, at least 28", multiple=4, why="the stem's space-to-depth block", forward=True),
    "Twins": SMALL,
    "VGG": FROM_32,
    "VovNet": SMALL,
    "Xception": SMALL,
    "XceptionAligned": ANY,
    "Xcit": SMALL,
}


def _planner(rule: Rule) -> Callable[[nn.Module, Context], Changes]:
    def plan_size_free(model: nn.Module, ctx: Context) -> Changes:
        rule.check(model, ctx)
        yield from ()

    return plan_size_free


for _rule in dict.fromkeys(RULES.values()):
    register(*(f"timm.models.{name}" for name, rule in RULES.items() if rule is _rule), sizes=_rule.sizes)(
        _planner(_rule)
    )


@register(
    models.ResNet,
    sizes="any; with average-pool antialiasing the stem's map % 8; with blur pooling from 17",
    examples={"resnet18": {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}},
)
def plan_resnet(model: models.ResNet, ctx: Context) -> Changes:
    """Check what the pools of antialiased variants can take.

    With `aa_layer` an average pool, a block's main branch floors where its shortcut rounds up, so a stage must
    not meet an odd map. A blur pool pads by reflection, which needs two cells.
    """
    antialias = [m for name, m in model.named_modules() if name.endswith("aa") and not isinstance(m, nn.Identity)]
    if any(isinstance(m, nn.AvgPool2d) for m in antialias):
        stem = [part for _, part in takewhile(lambda named: not named[0].startswith("layer"), parts(model))]
        size = ctx.output_size(*stem, channels=_first_conv(*stem).in_channels)
        if min(size) < 8 or not divisible(size, 8):
            ctx.invalid(
                f"gives a {text(size)} map after the stem, not divisible by 8: average-pool antialiasing halves it "
                "three times"
            )
    elif antialias and min(ctx.new_size) < 17:
        ctx.invalid("is below the minimum of 17 for blur pooling")
    yield from ()
