"""MLP-Mixer, gMixer, ResMLP and gMLP: linear layers whose inputs or outputs are the tokens of a grid."""

from __future__ import annotations

from timm.models.mlp_mixer import MixerBlock, MlpMixer, ResBlock, SpatialGatingBlock, SpatialGatingUnit
from torch import nn

from timm_resize.core.context import Changes, Context
from timm_resize.core.registry import register
from timm_resize.geometry import Size
from timm_resize.handlers.layers.patch_embed import SIZES, plan_grids

_STATE = "weights and biases over h*w tokens"

_METHOD = "the tokens are an image: written by interpolation, read by its (pseudo-)inverse"


@register(
    MlpMixer,
    state=_STATE,
    method=_METHOD,
    sizes=SIZES,
    options=("patch_size",),
    examples={
        "mixer_s32_224": {"mlp_ratio": (0.125, 0.25)},
        "gmixer_12_224": {},
        "resmlp_12_224": {},
        "gmlp_ti16_224": {},
    },
)
def plan_mlp_mixer(model: MlpMixer, ctx: Context) -> Changes:
    """Resample every layer that mixes tokens from the old patch grid to the new."""
    grids = yield from plan_grids(model, model.stem, ctx)
    for block in ctx.sequence(model, "blocks"):
        yield from ctx.visit(block, old=grids.old, new=grids.new)


@register(MixerBlock, state="mlp_tokens.fc1 (hidden, h*w), mlp_tokens.fc2 (h*w, hidden)", method=_METHOD)
def plan_mixer_block(block: MixerBlock, ctx: Context, *, old: Size, new: Size) -> Changes:
    """Resample the token MLP: `fc1` reads the grid, `fc2` writes it; the hidden units stay, gated or not."""
    fc1, fc2 = block.mlp_tokens.fc1, block.mlp_tokens.fc2
    yield from ctx.parameter(fc1, "weight", ctx.token_reader(old, new))
    yield from ctx.attribute(fc1, in_features=new[0] * new[1])
    yield from ctx.parameter(fc2, "weight", ctx.token_writer(old, new))
    yield from _written(fc2, ctx, old, new)


@register(ResBlock, state="linear_tokens (h*w, h*w)", method=_METHOD)
def plan_res_block(block: ResBlock, ctx: Context, *, old: Size, new: Size) -> Changes:
    """Resample the token-to-token matrix."""
    yield from _token_to_token(block.linear_tokens, ctx, old, new)


@register(SpatialGatingBlock, state="mlp_channels.gate.proj (h*w, h*w)", method=_METHOD)
def plan_spatial_gating_block(block: SpatialGatingBlock, ctx: Context, *, old: Size, new: Size) -> Changes:
    """Resample the gate inside the channel MLP."""
    yield from ctx.visit(block.mlp_channels.gate, old=old, new=new)


@register(SpatialGatingUnit, state="proj (h*w, h*w)", method=_METHOD)
def plan_spatial_gating_unit(unit: SpatialGatingUnit, ctx: Context, *, old: Size, new: Size) -> Changes:
    """Resample the token-to-token matrix of a gate; its bias stays near the 1 it starts at."""
    yield from _token_to_token(unit.proj, ctx, old, new)


def _token_to_token(linear: nn.Linear, ctx: Context, old: Size, new: Size) -> Changes:
    yield from ctx.parameter(linear, "weight", ctx.token_matrix(old, new))
    yield from ctx.attribute(linear, in_features=new[0] * new[1])
    yield from _written(linear, ctx, old, new)


def _written(linear: nn.Linear, ctx: Context, old: Size, new: Size) -> Changes:
    """Resample the bias of a layer whose outputs are the tokens."""
    yield from ctx.parameter(linear, "bias", ctx.token_writer(old, new), optional=True)
    yield from ctx.attribute(linear, out_features=new[0] * new[1])
