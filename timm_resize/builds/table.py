"""What `infer` found, as values and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from timm_resize.builds.entry import Entry
from timm_resize.builds.rules import generic
from timm_resize.geometry import Size, text


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

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The row of the table."""
        name = f"{self.name} (x{self.count})" if self.count > 1 else self.name
        return name, self.kind, f"{_side(self.old)} -> {_side(self.new)}", self.form, self.how


@dataclass(frozen=True)
class Inferred:
    """What `infer` found. Prints as a table.

    Attributes:
        cls: The model's class.
        rows: What depends on the size.
        sizes: Image sizes (H, W) that were looked at; the last one checked what the others told.
        refused: Sizes that the build did not take, with its reasons.
        registered: Whether the class can be resized from now on.
        problems: What stands against that, '' for each that can be carried over.
        note: A remark.
    """

    cls: type[nn.Module]
    rows: tuple[Row, ...]
    sizes: tuple[Size, ...]
    refused: Mapping[Size, str] = field(default_factory=dict)
    registered: bool = False
    problems: tuple[str, ...] = ()
    note: str = ""
    entry: Entry | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        looked = ", ".join(map(text, self.sizes))
        lines = [f"{self.cls.__name__}: built at {looked}{'' if self.registered else ' (not registered)'}"]
        if not self.rows:
            lines.append("  nothing depends on the size")
        cells = [row.cells for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = (" ".join(f" {cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells)
        lines += [f" {row.rstrip()}" for row in padded]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines + ([f"  note: {self.note}"] if self.note else []))


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
    for key, same in groups.items():
        yield replace(same[0], name=key[0], count=len(same)) if len(same) > 1 else same[0]
