"""What a parameter of a form is for, and so the map that carries it over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt

import torch
from torch import Tensor, nn

from timm_resize.builds.forms import Form, Shape
from timm_resize.core.maps import Maps
from timm_resize.geometry import Size, text, times
from timm_resize.resample import Interpolate, Resample, maps
from timm_resize.resample.blocked import Blocked

WORDS: Mapping[str, str] = {
    "positions": "a row for each cell of a grid, row-major; further rows are a prefix (class token first)",
    "positions:suffix": "the same, with the further rows last",
    "map": "a position embedding kept as a map, (..., h, w, dim) or (..., dim, h, w)",
    "blocks": "a map cut into blocks, (1, blocks, h*w, dim), as in NesT; it is resampled as one",
    "table": "a bias for each relative offset in a window; further rows are a suffix, as in BEiT",
    "table:prefix": "the same, with the further rows first",
    "offsets": "a bias for each absolute offset (|dy|, |dx|), as in LeViT; offset 0 is kept",
    "axis": "a row for each place, or relative offset, along one axis",
    "tokens": "weights of a linear layer that reads or writes the tokens of a grid",
    "flatten": "weights of a linear layer that reads a flattened map (channels, h, w)",
    "flatten:last": "the same of a map (h, w, channels)",
}
"""What a hint may say of a parameter."""


class Unclear(Exception):  # noqa: N818  (a signal inside this room)
    """Raised where no map follows from what is known of a tensor, with what to write, and the hints that would do."""

    def __init__(self, text: str, choices: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.choices = choices


@dataclass(frozen=True)
class Rule:
    """How one parameter follows the image size.

    Attributes:
        word: One of `WORDS`.
        forms: One form, or two for a weight that both reads and writes tokens.
        hinted: Whether the word is the caller's.
        blocks: Blocks along each axis, where a map is kept in blocks.
    """

    word: str
    forms: tuple[Form, ...]
    hinted: bool = False
    blocks: int = 1

    def how(self, ctx: Maps, sizes: Sequence[Size], shapes: Sequence[Shape]) -> Resample:
        """Return the map between the builds at two sizes, from the shapes of the parameter in both.

        Raises:
            Unclear: The shapes are of no grid that was found, or of several.
        """
        return self.between(ctx, [self._grids(form, sizes, shapes) for form in self.forms])

    def _grids(self, form: Form, sizes: Sequence[Size], shapes: Sequence[Shape]) -> tuple[Size, ...]:
        found = form.between(sizes, shapes)
        if len(found) != 1:
            names = " or ".join(sorted(" -> ".join(map(text, grids)) for grids in found)) or "no grid that was found"
            raise Unclear(f"its shapes {shapes[0]} and {shapes[1]} are of {names}")
        return found.pop()

    def between(self, ctx: Maps, grids: Sequence[Sequence[Size]]) -> Resample:
        """Return the map from the first to the second grid of each form."""
        form, (old, new) = self.forms[0], grids[0]
        word, _, place = self.word.partition(":")
        if word == "positions":
            how = ctx.pos_embed(old, new, form.rest, form.dim)
            return replace(how, prefix=0, suffix=form.rest) if place else how
        if word == "table":
            how = ctx.rel_pos_table(old, new, form.rest, form.dim, form.what == "offsets")
            return replace(how, prefix=form.rest, suffix=0) if place else how
        if word == "map":
            return ctx.pos_embed_map(old, new, form.dim)
        if word == "blocks":
            whole = ctx.pos_embed_map(times(old, self.blocks), times(new, self.blocks), dim=1, antialias=False)
            return Blocked(whole.axes, dim=1, blocks=self.blocks)
        if word == "offsets":
            return ctx.offset_table(old, new, form.dim)
        if word == "axis":
            plain = form.what == "axis"  # places as timm's positions, offsets as SAM's and ViTDet's tables
            options = ctx.interpolation(*(("bicubic", True) if plain else ("bilinear", False)))
            return Resample((Interpolate(form.sides(old)[0], form.sides(new)[0], **options),), dim=form.dim)
        if word == "flatten":
            last = place == "last"
            return maps.flatten_linear(old, new, channels=form.times, channels_last=last, **ctx.interpolation())
        if form.dim == 1:
            return ctx.token_reader(old, new)
        writer = ctx.token_writer(old, new)
        return writer if len(grids) == 1 else replace(writer, then=ctx.token_reader(grids[1][0], grids[1][1]))

    def call(self, grids: Sequence[str]) -> str:
        """Return the call of `ctx` in a handler, for 'old, new' of each form; `...` for what needs more words."""
        form = self.forms[0]
        word, _, place = self.word.partition(":")
        rest = f", {'prefix' if word == 'positions' else 'suffix'}={form.rest}" if form.rest else ""
        dim = f", dim={form.dim}" if form.dim != (word in ("positions", "offsets")) else ""
        if place or word in ("axis", "flatten", "blocks") or len(set(grids)) > 1:
            return "..."
        if word == "table":
            return f"ctx.rel_pos_table({grids[0]}{rest}{dim}{'' if form.what == 'offsets' else ', flat=False'})"
        if word == "tokens":
            kind = "matrix" if len(self.forms) == 2 else "reader" if form.dim == 1 else "writer"
            return f"ctx.token_{kind}({grids[0]})"
        if word == "map":
            return f"ctx.pos_embed_map({grids[0]}, dim={form.dim})"
        return f"ctx.{'pos_embed' if word == 'positions' else 'offset_table'}({grids[0]}{rest}{dim})"

    def __str__(self) -> str:
        rest = self.forms[0].rest
        where = "suffix" if self.word in ("table", "positions:suffix") else "prefix"
        more = f", {where} {rest}" if rest else ""
        return f"{self.word.partition(':')[0]}{more}{' (hint)' if self.hinted else ''}"


def is_offset_index(index: Tensor | None, grid: Size) -> bool:
    """Whether a buffer has |dy| * w + |dx| for each query and key of a grid (h, w), as LeViT's have.

    Queries are the cells 0, 1, 2 ... of each axis, or 0, 2, 4 ....
    """
    cells = grid[0] * grid[1]
    if index is None or index.dim() != 2 or index.is_floating_point() or index.shape[1] != cells:
        return False
    for step in (1, 2):
        down, right = (
            (torch.arange(0, side, step)[:, None] - torch.arange(side)).abs() for side in grid
        )  # (query, key) of one axis
        offsets = down[:, None, :, None] * grid[1] + right[None, :, None, :]
        if offsets.numel() == index.numel() and torch.equal(offsets.reshape(index.shape), index.to(offsets.dtype)):
            return True
    return False


def is_mixing(owner: nn.Module) -> bool:
    """Whether a module's weight is a matrix from inputs to outputs, and nothing else."""
    if isinstance(owner, (nn.Conv1d, nn.Conv2d)):
        return owner.groups == 1 and max(owner.kernel_size) == 1
    return isinstance(owner, nn.Linear)


def words(
    form: tuple[Form, ...], owner: nn.Module, name: str, shape: Shape, indexed: bool
) -> tuple[tuple[str, ...], bool]:
    """Return what a parameter of a form may be, and whether its shape says so by itself.

    Args:
        form: A reading of its shapes.
        owner: The module that holds it.
        name: Its name there.
        shape: Its shape at one size.
        indexed: Whether the module has an index of absolute offsets into it.
    """
    one, known = form[0], type(owner).__module__.startswith(("torch.", "timm."))
    if is_mixing(owner):
        if len(form) == 2 or (one.what == "cells" and one.rest == 0 and one.times == 1):
            return (("tokens",), known) if all(f.rest == 0 for f in form) else ((), False)
        return (("flatten", "flatten:last"), False) if one.times > 1 and name == "weight" else ((), False)
    if len(form) == 2 or (type(owner).__module__.startswith("torch.nn.") and not isinstance(owner, nn.Embedding)):
        return (), False
    alone = math.prod(shape[: one.dim]) == 1
    if one.what == "cells":
        if indexed:
            return ("offsets",), True
        both = ("positions", "offsets") if one.rest == 0 else ("positions", "positions:suffix")
        if one.rest == 0 and one.dim == 2 and len(shape) == 4 and shape[0] == 1 and isqrt(shape[1]) ** 2 == shape[1]:
            both = ("positions", "blocks")
        return both, alone
    if one.what == "offsets":
        return ("table",), True
    if one.what == "map":
        return ("map",), one.dim == 0 or shape[0] == 1
    if one.what == "offset map":
        return ("table",), one.dim == 1 and len(shape) == 3
    return ("axis",), one.what == "axis" and alone


def choose(
    found: Sequence[tuple[Form, ...]],
    owner: nn.Module,
    key: str,
    shape: Shape,
    *,
    hint: str = "",
    reorders: str = "",
    indexed: bool = False,
) -> Rule:
    """Return the rule for a parameter.

    Args:
        found: Every reading of its shapes.
        owner: The module that holds it.
        key: Its name in the model.
        shape: Its shape at one size.
        hint: What the caller says that it is, '' for nothing.
        reorders: A module that may put tokens into another order than the grid's, '' for none.
        indexed: Whether the module has an index of absolute offsets into it.

    Raises:
        Unclear: Nothing fits, or more than one thing does; the text says which hint to give.
    """
    fitting = [(form, *words(form, owner, key.rpartition(".")[2], shape, indexed)) for form in found]
    if hint:
        word = hint.partition(":")[0]
        chosen = [form for form, possible, _ in fitting if any(p.partition(":")[0] == word for p in possible)]
        if len(chosen) == 1:
            return Rule(hint, chosen[0], True, isqrt(shape[1]) if word == "blocks" else 1)
        raise Unclear(f"the hint {hint!r} does not fit it: {_readings(found)}")
    if not any(possible for _, possible, _ in fitting):
        raise Unclear(f"{_readings(found)}, which no map is known for. Write a handler with @timm_resize.register")
    every = tuple(dict.fromkeys(word for _, possible, _ in fitting for word in possible))
    advice = f"Give hints={{{generic(key)!r}: {' or '.join(map(repr, every))}}}"
    if len(fitting) > 1:
        raise Unclear(f"{_readings(found)}. {advice}", every)
    form, possible, sure = fitting[0]
    if not sure:
        raise Unclear(f"{_readings(found)}, and its shape does not say what of. {advice}", every)
    if reorders and possible[0] == "positions":
        raise Unclear(f"{reorders} may put tokens into another order than row-major. {advice}", every)
    return Rule(possible[0], form)


def _readings(found: Sequence[tuple[Form, ...]]) -> str:
    texts = [" and ".join(map(str, form)) for form in found]
    return f"it reads as {' or as '.join(texts)}" if texts else "no closed form gives its shapes"


def generic(key: str) -> str:
    """Return a dotted name with * for the numbers in it."""
    return ".".join("*" if part.isdigit() else part for part in key.split("."))
