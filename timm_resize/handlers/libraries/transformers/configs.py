"""The configuration of a transformers model: where its image size stands, and what has to follow a resize.

A model and nearly all of its modules hold one configuration object, whose parts (`vision_config`, `backbone_config`)
are held by the modules of that part. Forwards, `save_pretrained` and heads read sizes from it. So a resize puts one
changed copy of each in the place of every one, and the objects that there were stay as they are: the caller may have
made other models of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from timm_resize.core.context import Change, Changes, Context
from timm_resize.geometry import Size

SizeValue = int | Sequence[int]
"""An image size as configurations and modules of transformers keep it: one number, or height and width."""


def image_size(model: nn.Module) -> Size | None:
    """Return the image size (H, W) that a model's configuration gives, None where it gives none, or several."""
    config = getattr(model, "config", None)
    found = {as_pair(one.image_size) for one in _sized(config)} if isinstance(config, PretrainedConfig) else set()
    return found.pop() if len(found) == 1 else None


def _sized(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return the parts of a configuration that give an image size; the whole's is read where no part has one."""
    parts = [one for part in vars(config).values() if isinstance(part, PretrainedConfig) for one in _sized(part)]
    return parts or ([config] if getattr(config, "image_size", None) is not None else [])


def as_pair(value: SizeValue) -> Size:
    """Return a size as (height, width)."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def like(value: SizeValue, size: Size) -> SizeValue:
    """Return a size in the form of a module's attribute: a number where it is one, a list, or a pair."""
    if isinstance(value, int):
        return size[0]
    return list(size) if isinstance(value, list) else size


def plan_model(model: nn.Module, ctx: Context) -> Changes:
    """Write the new image size into the configuration of a model whose layers have their own handlers.

    A list, as files have it, stays a list. Otherwise a square size is one number, another one (height, width).
    """
    yield from plan_configs(ctx, lambda config: _set_size(config, ctx.new_size))


def plan_configs(ctx: Context, write: Callable[[Any], None]) -> Changes:
    """Give every module that holds a configuration a copy of it, if `write` changes any.

    Those without a change are copied with them: they are parts of the others.
    """
    held = [
        (module, name, value)
        for module in ctx.root.modules()
        for name, value in list(module.__dict__.items())
        if isinstance(value, PretrainedConfig)
    ]
    old = {id(value): value for *_, value in held}
    before, after = copy.deepcopy(list(old.values())), copy.deepcopy(list(old.values()))
    for config in after:
        write(config)
    if list(map(vars, before)) == list(map(vars, after)):  # configurations are equal where their declared fields are
        return
    copies = {key: pair for key, *pair in zip(old, before, after, strict=True)}
    for module, name, value in held:
        was, now = copies[id(value)]  # a copy of the old one, so that a plan is stale once somebody writes to that
        yield Change(ctx.path(module), name, "attribute", was, now)


def plan_square_model(model: nn.Module, ctx: Context) -> Changes:
    """Refuse what is not square for a model whose head takes the root of the count of patches for both sides."""
    refuse_oblong(ctx, f"the forward of {type(model).__name__} makes a square map of its patches")
    yield from plan_model(model, ctx)


def refuse_oblong(ctx: Context, why: str) -> None:
    """Refuse a size that is not square."""
    if ctx.new_size[0] != ctx.new_size[1]:
        ctx.invalid(f"is not square, and {why}")


def resized(config: PretrainedConfig, size: Size) -> PretrainedConfig:
    """Return a copy of a configuration with another image size."""
    out = copy.deepcopy(config)
    _set_size(out, size)
    return out


def _set_size(config: PretrainedConfig, size: Size) -> None:
    """Set the image size that a configuration gives."""
    for one in _sized(config):
        value = one.image_size
        one.image_size = list(size) if isinstance(value, list) else size[0] if size[0] == size[1] else size
