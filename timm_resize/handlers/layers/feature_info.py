"""The record of a model's feature maps, whose reductions follow the patch size. No module is registered here."""

from __future__ import annotations

import copy

from torch import nn

from timm_resize.core.context import Changes, Context


def feature_rows(model: nn.Module) -> list[dict[str, object]]:
    """Return one row per stage of the whole model, from `feature_info` or a feature wrapper's `FeatureInfo`."""
    info = getattr(model, "feature_info", None) or []
    return list(getattr(info, "info", info))


def plan_reductions(model: nn.Module, ctx: Context, reduction: int, growth: int = 1) -> Changes:
    """Set the pixels per cell in `feature_info`: `reduction` in the first row, `growth` times as many in each next."""
    info = getattr(model, "feature_info", None)
    rows = [dict(row, reduction=reduction * growth**i) for i, row in enumerate(feature_rows(model))]
    if isinstance(info, list):
        yield from ctx.attribute(model, feature_info=rows)
    elif info is not None and rows != feature_rows(model):
        new = copy.copy(info)
        new.info = rows
        yield from ctx.attribute(model, feature_info=new)
