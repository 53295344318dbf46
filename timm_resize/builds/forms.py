"""Closed forms for sequences of sizes: how a tensor's sides follow from the height and the width of the image."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from timm_resize.geometry import Size

LONGEST = 128
"""Most pixels to a cell that are tried."""

SPLITS = (2, 3, 4, 6, 7, 8, 12, 14, 16, 32)
"""Divisors that are tried one after the other, one rounding down and one up."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """The cells along one axis: pixels divided once or twice, each division rounded its own way, at most `cap`.

    Attributes:
        steps: (divisor, whether it rounds up) in order.
        cap: Most cells, 0 for any number.

    Example:
        >>> Side(((4, False), (8, True)))(230), Side(((32, False),), cap=7)(320)
        (8, 7)
    """

    steps: tuple[tuple[int, bool], ...]
    cap: int = 0

    def __call__(self, pixels: int) -> int:
        """Return the cells of that many pixels."""
        for by, up in self.steps:
            pixels = -(-pixels // by) if up else pixels // by
        return min(pixels, self.cap) if self.cap else pixels

    def text(self, axis: str) -> str:
        """Write it as Python, for an axis called `axis`."""
        for by, up in self.steps:
            axis = f"-(-{axis} // {by})" if up else f"{axis} // {by}" if by > 1 else axis
        return f"min({axis}, {self.cap})" if self.cap else axis


Grid = tuple[Side, Side]
"""The sides of height and width."""

Seen = tuple[tuple[Size, ...], tuple[Grid, ...]]
"""Grids (h, w) at each size, and the sides that give them."""

What = Literal["cells", "offsets", "map", "offset map", "axis", "offset axis"]

FORMULAS: dict[What, Callable[[Size], Shape]] = {
    "cells": lambda grid: (grid[0] * grid[1],),
    "offsets": lambda grid: ((2 * grid[0] - 1) * (2 * grid[1] - 1),),
    "map": lambda grid: grid,
    "offset map": lambda grid: (2 * grid[0] - 1, 2 * grid[1] - 1),
}
"""What sides of a tensor may be of a grid (h, w); an axis alone is h or w, or 2h-1 or 2w-1."""


@dataclass(frozen=True)
class Form:
    """One reading of one or two neighbouring dimensions, with every grid that gives the same on all sizes tried.

    Attributes:
        dim: The (first) dimension.
        what: Which formula of the grid.
        grids: Grids that differ in rounding only, as far as was tried.
        rest: Rows that no grid counts.
        times: Entries for each cell.
        axis: 0 for h, 1 for w, where it is of one axis alone.
    """

    dim: int
    what: What
    grids: tuple[Grid, ...]
    rest: int = 0
    times: int = 1
    axis: int = 0

    def of(self, size: Size) -> Size:
        """Return the likeliest grid (h, w) of an image."""
        h, w = self.grids[0]
        return h(size[0]), w(size[1])

    def sides(self, grid: Size) -> Shape:
        """Return the sides of a tensor for a grid (h, w)."""
        if self.what in ("axis", "offset axis"):
            cells = grid[self.axis]
            return (cells if self.what == "axis" else 2 * cells - 1,)
        return tuple(side * self.times + self.rest for side in FORMULAS[self.what](grid))

    def narrowed(self, size: Size, shape: Shape) -> Form | None:
        """Return the form with the grids alone that fit one more build; None where none does."""
        grids = ((h, w) for h, w in self.grids if self._fits(self.sides((h(size[0]), w(size[1]))), shape))
        kept = tuple(grids)
        return replace(self, grids=kept) if kept else None

    def between(self, sizes: Sequence[Size], shapes: Sequence[Shape]) -> set[tuple[Size, ...]]:
        """Return the grids at several sizes, each set of them by one rounding."""
        found = {tuple((h(size[0]), w(size[1])) for size in sizes) for h, w in self.grids}
        return {
            grids
            for grids in found
            if all(self._fits(self.sides(grid), shape) for grid, shape in zip(grids, shapes, strict=True))
        }

    def _fits(self, sides: Shape, shape: Shape) -> bool:
        return shape[self.dim : self.dim + len(sides)] == sides

    def __str__(self) -> str:
        h, w = (side.text(axis) for side, axis in zip(self.grids[0], "HW", strict=True))
        names = ("h", "w")[self.axis], ("2h-1", "2w-1")[self.axis]
        formula = {
            "cells": "h*w",
            "offsets": "(2h-1)*(2w-1)",
            "map": "h, w",
            "offset map": "2h-1, 2w-1",
            "axis": names[0],
            "offset axis": names[1],
        }[self.what]
        head = f"{self.times}*" if self.times > 1 else ""
        return f"{head}{formula}{f' + {self.rest}' if self.rest else ''}, h = {h}, w = {w}"


def forms(sizes: Sequence[Size], shapes: Sequence[Shape], *, channels: bool = False) -> list[tuple[Form, ...]]:
    """Return every reading of the dimensions that differ between the shapes of a tensor at several image sizes.

    Args:
        sizes: Image sizes (H, W), all different.
        shapes: The tensor's shape at each, of the same length.
        channels: Look for several entries to a cell, too.

    Returns:
        Readings, each a form for one dimension, for two neighbouring ones together, or for two dimensions apart. Empty
        where nothing fits. Two readings or more where the shapes cannot tell.
    """
    dims = tuple(dim for dim, sides in enumerate(zip(*shapes, strict=True)) if len(set(sides)) > 1)
    key = tuple(sizes)
    columns = [tuple(shape[dim] for shape in shapes) for dim in dims]
    if len(dims) == 1:
        return [(form,) for form in _single(key, columns[0], dims[0], channels)]
    if len(dims) != 2:
        return []
    out = [(form,) for form in _pair(key, columns[0], columns[1], dims[0])] if dims[1] == dims[0] + 1 else []
    both = (_single(key, column, dim, False) for dim, column in zip(dims, columns, strict=True))
    first, second = ([form for form in found if form.what == "cells"] for found in both)
    return out + [(a, b) for a in first for b in second]


@functools.lru_cache(maxsize=256)
def _single(sizes: tuple[Size, ...], column: Shape, dim: int, channels: bool) -> tuple[Form, ...]:
    """Return the forms of one dimension, whose side at each size is given."""
    same = list(_counted(_grids(sizes), column, dim, channels))
    out = same or list(_counted(_oblong(sizes, column), column, dim, False))
    square = all(h == w for h, w in sizes)
    for axis in (0,) if square else (0, 1):
        for what, sides in _plain_or_offsets("axis", "offset axis", column):
            found = _sides(tuple(size[axis] for size in sizes)).get(sides, [])
            if found:
                out.append(Form(dim, what, tuple((side, side) for side in found), axis=axis))
    return tuple(out)


@functools.lru_cache(maxsize=256)
def _pair(sizes: tuple[Size, ...], rows: Shape, columns: Shape, dim: int) -> tuple[Form, ...]:
    """Return the forms of two neighbouring dimensions."""
    out = []
    for (what, h), (_, w) in zip(
        _plain_or_offsets("map", "offset map", rows), _plain_or_offsets("map", "offset map", columns), strict=True
    ):
        above, across = (_sides(tuple(size[i] for size in sizes)).get(found, []) for i, found in enumerate((h, w)))
        both = [(side, side) for side in above if side in across]
        grids = both or list(itertools.product(above, across))
        if grids:
            out.append(Form(dim, what, tuple(grids)))
    return tuple(out)


def _plain_or_offsets(plain: What, offsets: What, sides: Shape) -> list[tuple[What, Shape]]:
    """Return what numbers of rows are of as they are, and as counts of relative offsets; never, where one is even."""
    odd = all(side % 2 for side in sides)
    return [(plain, sides), (offsets, tuple((side + 1) // 2 for side in sides) if odd else ())]


def _counted(found: Iterable[Seen], column: Shape, dim: int, channels: bool) -> Iterator[Form]:
    """Yield the forms of one dimension that count the cells or offsets of some of the grids."""
    whats: tuple[What, ...] = ("cells", "offsets")
    for seen, grids in found:
        for what in whats:
            formula = FORMULAS[what]
            first = formula(seen[0])[0]
            rest, times = column[0] - first, column[0] // first
            if rest >= 0 and all(side - formula(grid)[0] == rest for side, grid in zip(column, seen, strict=True)):
                yield Form(dim, what, grids, rest)
                continue
            several = channels and what == "cells" and times > 1
            if several and all(side == formula(grid)[0] * times for side, grid in zip(column, seen, strict=True)):
                yield Form(dim, what, grids, times=times)


@functools.cache
def _every_side() -> tuple[Side, ...]:
    """Return the sides that are tried: those of practice first."""
    once = [Side(((by, up),)) for by in range(1, LONGEST + 1) for up in (False, True) if by > 1 or not up]
    twice = [Side(((a, up), (b, not up))) for a in SPLITS for b in SPLITS for up in (False, True)]
    caps = [Side(((by, up),), cap) for cap in range(2, 33) for by in (1, 4, 8, 14, 16, 32, 64) for up in (False, True)]
    return tuple(sorted([*once, *twice, *caps], key=_oddity))


def _oddity(side: Side) -> tuple[bool, int, int, int]:
    """Return what sides of practice are first by: no cap, powers of two or else multiples of 7, one rounding, down."""
    odd = max(0 if by & (by - 1) == 0 else 1 if by in (7, 14, 28) else 2 for by, _ in side.steps)
    return bool(side.cap), odd, len(side.steps), sum(up for _, up in side.steps)


@functools.lru_cache(maxsize=16)
def _sides(lengths: Shape) -> dict[Shape, list[Side]]:
    """Return what the sides make of several lengths of one axis, with the sides that make it."""
    out: dict[Shape, list[Side]] = {}
    for side in _every_side():
        out.setdefault(tuple(map(side, lengths)), []).append(side)
    return out


@functools.lru_cache(maxsize=4)
def _grids(sizes: tuple[Size, ...]) -> list[Seen]:
    """Return what one side for both axes makes of the sizes, with the sides that make it."""
    found: dict[tuple[Size, ...], list[Grid]] = {}
    for side in _every_side():
        seen = tuple((side(h), side(w)) for h, w in sizes)
        if min(map(min, seen)) > 0 and len(set(seen)) > 1:
            found.setdefault(seen, []).append((side, side))
    return [(seen, tuple(grids)) for seen, grids in found.items()]


def _oblong(sizes: tuple[Size, ...], column: Shape) -> Iterator[Seen]:
    """Yield grids whose cells are not square, with as many cells but for a constant."""
    plain: list[list[tuple[Shape, list[Side]]]] = []
    for axis in (0, 1):
        found = _sides(tuple(size[axis] for size in sizes)).items()
        once = [(seen, [side for side in sides if len(side.steps) == 1 and not side.cap]) for seen, sides in found]
        plain.append([(seen, sides) for seen, sides in once if sides and len(set(seen)) > 2])
    for (h, those), (w, these) in itertools.product(*plain):
        rest = column[0] - h[0] * w[0]
        if rest >= 0 and min(h + w) > 0 and all(a * b + rest == side for a, b, side in zip(h, w, column, strict=True)):
            yield tuple(zip(h, w, strict=True)), tuple(itertools.product(those, these))
