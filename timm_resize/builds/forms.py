"""Closed forms for sequences of sizes: how a tensor's sides follow from the height and the width of the image."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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

    def sides(self, grid: Size) -> Shape:
        """Return the sides of a tensor for a grid (h, w)."""
        if self.what in ("axis", "offset axis"):
            cells = grid[self.axis]
            return (cells if self.what == "axis" else 2 * cells - 1,)
        return tuple(side * self.times + self.rest for side in FORMULAS[self.what](grid))

    def at(self, size: Size, shape: Shape) -> set[Size]:
        """Return the grids (h, w) of an image of `size` for which a tensor of `shape` has its sides."""
        found = {(h(size[0]), w(size[1])) for h, w in self.grids}
        return {grid for grid in found if self._fits(self.sides(grid), shape)}

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
    if len(dims) == 1:
        column = tuple(shape[dims[0]] for shape in shapes)
        return [(form,) for form in _single(key, column, dims[0], channels)]
    if len(dims) != 2:
        return []
    columns = [tuple(shape[dim] for shape in shapes) for dim in dims]
    out = [(form,) for form in _pair(key, (columns[0], columns[1]), dims[0])] if dims[1] == dims[0] + 1 else []
    both = (_single(key, column, dim, False) for dim, column in zip(dims, columns, strict=True))
    first, second = ([form for form in found if form.what == "cells"] for found in both)
    return out + [(a, b) for a in first for b in second]


def _single(sizes: tuple[Size, ...], column: Shape, dim: int, channels: bool) -> Iterator[Form]:
    """Yield the forms of one dimension, whose side at each size is given."""
    square = list(_counted(_grids(sizes, max(column)), column, dim, channels))
    yield from square or _counted(_oblong(sizes, column), column, dim, False)
    for axis in (0, 1):
        for what, sides in (("axis", column), ("offset axis", tuple((side + 1) / 2 for side in column))):
            found = tuple((side, side) for side in _plain_sides() if [side(size[axis]) for size in sizes] == [*sides])
            if found:
                yield Form(dim, what, found, axis=axis)


def _counted(found: Iterable[Seen], column: Shape, dim: int, channels: bool) -> Iterator[Form]:
    """Yield the forms of one dimension that count the cells or offsets of some of the grids."""
    whats: tuple[What, ...] = ("cells", "offsets")
    for seen, grids in found:
        for what in whats:
            counts = [FORMULAS[what](grid)[0] for grid in seen]
            rest, times = column[0] - counts[0], column[0] // counts[0]
            if rest >= 0 and all(side - count == rest for side, count in zip(column, counts, strict=True)):
                yield Form(dim, what, grids, rest)
            elif channels and what == "cells" and times > 1:
                if all(side == count * times for side, count in zip(column, counts, strict=True)):
                    yield Form(dim, what, grids, times=times)


def _pair(sizes: tuple[Size, ...], columns: tuple[Shape, Shape], dim: int) -> Iterator[Form]:
    """Yield the forms of two neighbouring dimensions."""
    seen = list(zip(*columns, strict=True))
    for what, wanted in (("map", seen), ("offset map", [((h + 1) / 2, (w + 1) / 2) for h, w in seen])):
        sides = [
            [side for side in _every_side(int(max(column))) if [side(size[axis]) for size in sizes] == [*column]]
            for axis, column in enumerate(zip(*wanted, strict=True))
        ]
        both = [(side, side) for side in sides[0] if side in sides[1]]
        grids = both or [(h, w) for h in sides[0] for w in sides[1]]
        if grids:
            yield Form(dim, what, tuple(grids))


@functools.cache
def _plain_sides() -> tuple[Side, ...]:
    once = [Side(((by, up),)) for by in range(1, LONGEST + 1) for up in (False, True) if by > 1 or not up]
    twice = [Side(((a, up), (b, not up))) for a in SPLITS for b in SPLITS for up in (False, True)]
    return (*once, *twice)


def _every_side(largest: int) -> Iterable[Side]:
    """Return the sides, and those that stop at the largest that was seen."""
    capped = (Side(((by, up),), cap=largest) for by in (*SPLITS, 1, 64) for up in (False, True)) if largest < 64 else ()
    return (*_plain_sides(), *capped)


@functools.lru_cache(maxsize=16)
def _grids(sizes: tuple[Size, ...], largest: int) -> list[Seen]:
    """Return what the sides tried give at the sizes, of no more than `largest` cells, with the sides that give it.

    One side for both axes comes first; where caps are, those of the windows of practice.
    """
    found: dict[tuple[Size, ...], list[Grid]] = {}
    caps = [Side(((by, up),), cap) for cap in range(2, 33) for by in (4, 8, 16, 32, 64) for up in (False, True)]
    for side in (*_plain_sides(), *caps):
        seen = tuple((side(h), side(w)) for h, w in sizes)
        if min(map(min, seen)) > 0 and all(h * w <= largest for h, w in seen) and len(set(seen)) > 1:
            found.setdefault(seen, []).append((side, side))
    return [(seen, tuple(grids)) for seen, grids in found.items()]


def _oblong(sizes: tuple[Size, ...], column: Shape) -> Iterator[Seen]:
    """Yield grids whose cells are not square, with as many cells but for a constant."""
    sides = [Side(((by, up),)) for by in range(2, LONGEST // 2) for up in (False, True)]
    by_axis: list[dict[Shape, list[Side]]] = [{}, {}]
    for axis, found in enumerate(by_axis):
        for side in sides:
            found.setdefault(tuple(side(size[axis]) for size in sizes), []).append(side)
    for (h, those), (w, these) in itertools.product(*(found.items() for found in by_axis)):
        rest = column[0] - h[0] * w[0]
        if rest >= 0 and min(h + w) > 0 and all(a * b + rest == side for a, b, side in zip(h, w, column, strict=True)):
            yield tuple(zip(h, w, strict=True)), tuple(itertools.product(those, these))
