"""The rows of what `infer` found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from timm_resize.builds.forms import Form
from timm_resize.builds.rules import Rule, generic


@dataclass(frozen=True)
class Row:
    """One thing that depends on the size, or several that do alike.

    Attributes:
        name: Dotted name, * for the numbers of blocks.
        kind: "parameter", "buffer" or "attribute".
        old: What the build at the first size has: a shape, or an attribute's value.
        new: What the build at the second size has.
        form: How it follows from the image's H and W.
        how: What a resize does to it.
        count: How many there are.
        problem: Why it cannot be carried over, and what to write; '' where it can.
        choices: The hints that would say what it is.
        rule: How a parameter is carried over, None where that is not told.
        reading: What an attribute's numbers are of, None for nothing.
    """

    name: str
    kind: str
    old: object
    new: object
    form: str
    how: str
    count: int = 1
    problem: str = ""
    choices: tuple[str, ...] = ()
    rule: Rule | None = field(default=None, repr=False)
    reading: Form | None = field(default=None, repr=False)

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The row of the table."""
        name = f"{self.name} (x{self.count})" if self.count > 1 else self.name
        return name, self.kind, f"{_side(self.old)} -> {_side(self.new)}", self.form, self.how


def _side(value: object) -> str:
    if isinstance(value, tuple) and value and all(type(side) is int for side in value):
        return "x".join(map(str, value))
    return repr(value) if len(repr(value)) <= 24 else "…"


def merged(rows: Sequence[Row]) -> Iterator[Row]:
    """Merge rows that differ only in the numbers in their names."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (generic(row.name), row.kind, repr(row.old), repr(row.new), row.form, row.how)
        groups.setdefault(key, []).append(row)
    for (name, *_), same in groups.items():
        yield replace(same[0], name=name, count=len(same)) if len(same) > 1 else same[0]
