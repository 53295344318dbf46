"""The skeleton of a handler, from two builds of a model at two image sizes."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator

import timm
import torch
from torch import nn

from timm_resize.core.plan import MISSING, same_value, shape_of
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size

SIDES = ((224, 320), (256, 384), (192, 288), (224, 448))
"""Image sizes (H, W) that a pair of builds tries: not square, so that the two axes can be told apart."""

SKIPPED = ("_traits", "_model_args", "pretrained_cfg", "default_cfg", "training")
"""Attributes that the planner keeps itself, or that are not the handler's."""


def skeleton(name: str, **kwargs: object) -> str:
    """Return the source of a handler for the class of a timm model."""
    built = _builds(name, kwargs)
    if built is None:
        model = _build(name, kwargs)
        note = "Its constructor takes no img_size, so nothing of it was found to depend on the size."
        refusal = 'ctx.invalid("is smaller than the stride of 32")  # or what else forward needs of a size'
        body = ["if min(ctx.new_size) < 32:", f"    {refusal}", "yield from ()"]
        return _file(model, name, kwargs, note, body)
    (old, small), (new, large) = built
    note = f"Compared at {old} and {new}. grid_of is a guess: use forward's own rounding."
    grids = _grids(small)
    body = ["old, new = grid_of(model, ctx.old_size), grid_of(model, ctx.new_size)"]
    for (path, a), (_, b) in zip(small.named_modules(), large.named_modules(), strict=True):
        owner = "model" + "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in path.split(".") if p)
        body += _rules(owner, a, b, grids, _grids(large))
    return _file(small, name, kwargs, note, body)


def _builds(name: str, kwargs: dict[str, object]) -> list[tuple[Size, nn.Module]] | None:
    """Return two builds whose patch grids are not square; None where the constructor takes no `img_size`."""
    out, problem = [], None
    for size in SIDES:
        try:
            out.append((size, _build(name, {**kwargs, "img_size": size})))
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            problem = error
            if isinstance(error, TypeError) and "img_size" in str(error):
                return None
        if len(out) == 2:
            return out
    raise ResizeError(f"{name} could be built at fewer than two of {SIDES}: {problem}.")


def _build(name: str, kwargs: dict[str, object]) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **kwargs)
    return model


def _grids(model: nn.Module) -> list[Size]:
    """Return the pairs (h, w) that modules hold as attributes: grids, maps, windows; the outermost module's first."""
    held = [v for m in model.modules() for k, v in vars(m).items() if isinstance(v, tuple) and "img" not in k]
    pairs = [v for v in held if len(v) == 2 and all(isinstance(side, int) and side > 1 for side in v)]
    return list(dict.fromkeys(pairs))


def _rules(owner: str, a: nn.Module, b: nn.Module, old: list[Size], new: list[Size]) -> Iterator[str]:
    """Write a line for each tensor and attribute of a module that differs between two builds."""
    for name, tensor in a._parameters.items():
        before, after = shape_of(tensor), shape_of(b._parameters[name])
        if before is not None and after is not None and before != after:
            rule = _parameter_rule(before, after, old, new)
            if isinstance(a, nn.Linear):  # its tokens are inputs or outputs
                rule = rule.replace("pos_embed(old, new, prefix=0, dim=1)", "token_reader(old, new)")
                rule = rule.replace("pos_embed(old, new, prefix=0, dim=0)", "token_writer(old, new)")
            yield f'yield from ctx.parameter({owner}, "{name}", {rule})  # {before} -> {after}'
    for name in a._buffers:
        before, after = shape_of(a._buffers[name]), shape_of(b._buffers[name])
        if before != after:
            call = f'ctx.buffer({owner}, "{name}", {after}, Rebuild(make_{name}, (new,)))'
            yield f"yield from {call}  # {before} -> {after}"
    for name, value in vars(a).items():
        other = vars(b).get(name, MISSING)
        if not name.startswith("_") and name not in SKIPPED and not same_value(value, other):
            yield f"yield from ctx.attribute({owner}, {name}=...)  # {_short(value)} -> {_short(other)}"


def _short(value: object) -> str:
    return textwrap.shorten(repr(value), 50, placeholder="...")


def _parameter_rule(before: tuple[int, ...], after: tuple[int, ...], old: list[Size], new: list[Size]) -> str:
    """Return the call of ctx whose map takes one shape to the other."""
    changed = [i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y]
    if len(before) != len(after):
        return "...  # no map of ctx changes the number of dimensions"
    first = changed[0]
    if len(changed) == 2 and changed[1] == first + 1:
        areas = {h * w for h, w in old}
        if before[0] == before[1] and before[first] in areas:
            return "ctx.token_matrix(old, new)"
        if all(side % 2 for side in (*before[first : first + 2], *after[first : first + 2])):
            return f"ctx.rel_pos_table(old, new, dim={first}, flat=False)"
        return f"ctx.pos_embed_map({before[first : first + 2]}, {after[first : first + 2]}, dim={first})"
    if len(changed) == 1:
        for (h, w), (h2, w2) in ((p, q) for p in old for q in new):
            offsets = before[first] - (2 * h - 1) * (2 * w - 1)
            if 0 <= offsets <= 3 and after[first] - (2 * h2 - 1) * (2 * w2 - 1) == offsets:
                return f"ctx.rel_pos_table(old, new, suffix={offsets}{f', dim={first}' if first else ''})"
            prefix = before[first] - h * w
            if 0 <= prefix <= 16 and after[first] - h2 * w2 == prefix:
                return f"ctx.pos_embed(old, new, prefix={prefix}, dim={first})"
    return "...  # no map of ctx was found for these shapes"


def _file(model: nn.Module, name: str, kwargs: dict[str, object], note: str, body: list[str]) -> str:
    cls = type(model)
    held = (getattr(m, "patch_size", None) for m in model.modules())
    patch = next((p for p in held if isinstance(p, tuple)), (16, 16))
    head = f'''"""How {cls.__name__} follows the image size. {note}"""

from {cls.__module__} import {cls.__name__}

from timm_resize import Changes, Context, Rebuild, register


def grid_of(model: {cls.__name__}, size: tuple[int, int]) -> tuple[int, int]:
    """Return the grid (h, w) that forward makes of an image."""
    return size[0] // {patch[0]}, size[1] // {patch[1]}


@register({cls.__name__}, state="...", method="...", sizes="any", examples={{{name!r}: {kwargs!r}}})
def plan_{cls.__name__.lower()}(model: {cls.__name__}, ctx: Context) -> Changes:
    """Say in a line what changes. Equal rows of blocks want a loop; layers that have handlers want ctx.visit."""
'''
    return inspect.cleandoc(head) + "\n" + textwrap.indent("\n".join(body), "    ")
