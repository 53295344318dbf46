"""SigLIP 2 for patches of any grid."""

from __future__ import annotations

from torch import nn
from transformers.models.siglip2.modeling_siglip2 import Siglip2PreTrainedModel

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.errors import UnsupportedModelError


def no_size(model: nn.Module) -> None:
    """Return the image size: there is none."""


@register(Siglip2PreTrainedModel, state="none: patches come with their grid", method="refused", sizes="", size=no_size)
def refuse_siglip2(model: Siglip2PreTrainedModel, ctx: Context) -> Changes:
    """Refuse: this model is given patches with their grid, and interpolates positions to it."""
    raise UnsupportedModelError(
        f"{type(model).__name__}: has no image size: it takes patches of any grid as they are. Set max_num_patches of "
        "its processor.",
        model=type(model).__name__,
    )
    yield
