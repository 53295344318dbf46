"""GlobalContextVit: windows whose size the depth of each stage's pooled global query fixes."""

from __future__ import annotations

from timm.models.gcvit import GlobalContextVit, GlobalContextVitStage
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, divisible, floor_div, text

STEM_STRIDE = 4


@register(
    GlobalContextVit,
    state="rel_pos tables over each stage's window",
    method="tables resampled; windows scale with the image",
    sizes="multiples of 32",
    options=("window_size",),
    examples={"gcvit_xxtiny": {"embed_dim": 16}},
)
def plan_gcvit(model: GlobalContextVit, ctx: Context) -> Changes:
    """Give each stage the window that its global query has: the stage's map after its pooling layers.

    The number of those layers is part of the weights, so a window is a fixed fraction of the image.
    """
    stages = ctx.sequence(model, "stages")
    units = [STEM_STRIDE * 2**i * 2 ** _pools(stage) for i, stage in enumerate(stages)]  # pixels per window side cell
    for number, unit in enumerate(units, 1):
        if not divisible(ctx.new_size, unit):
            ctx.invalid(f"is not divisible by {unit}, the pixels per token of stage {number}'s global query")
    windows = [floor_div(ctx.new_size, unit) for unit in units]
    _check_asked(ctx, stages, windows)
    for i, (stage, window) in enumerate(zip(stages, windows, strict=True)):
        grid = floor_div(ctx.new_size, STEM_STRIDE * 2**i)
        count = (grid[0] // window[0]) * (grid[1] // window[1])
        for block in stage.blocks:
            yield from ctx.attribute(block, window_size=window, num_windows=count)
            yield from ctx.attribute(block.attn, window_size=window)
            yield from ctx.visit(block.attn.rel_pos, window=window)
        yield from ctx.attribute(stage, feat_size=grid)
    if "window_size" in getattr(model, "_model_args", {}):
        ctx.record(window_size=tuple(windows))


def _pools(stage: GlobalContextVitStage) -> int:
    """Count the stride-2 poolings between a stage's map and its global query."""
    return sum(isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)) for layer in stage.global_block.modules())


def _check_asked(ctx: Context, stages: list[GlobalContextVitStage], windows: list[Size]) -> None:
    """Refuse windows, asked for or to be kept, that the global queries do not have."""
    asked = ctx.window_sizes(len(stages))
    if asked is not None and list(asked) != windows:
        raise ResizeError(
            f"{type(ctx.root).__name__}: window_size={ctx.option('window_size')!r} is not that of the global queries, "
            f"whose pooling is part of the weights. Use window_size={tuple(windows)} for img_size={ctx.new_size}."
        )
    present = [tuple(stage.blocks[0].window_size) for stage in stages]
    if ctx.request.window_policy == "keep" and present != windows:
        have = ", ".join(text(window) for window in windows)
        ctx.invalid(f"gives global queries and so windows of {have}, against window_policy='keep'")
