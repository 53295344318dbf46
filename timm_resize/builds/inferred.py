"""What `infer` found, as a value that prints as a table and as a handler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from timm_resize.builds.entry import Entry
from timm_resize.builds.source import handler_source
from timm_resize.builds.table import Row
from timm_resize.geometry import Size, text


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

    def handler_source(self, examples: Mapping[str, Mapping[str, object]] | None = None) -> str:
        """Return the source of a handler that does what the table says; `...` stands for what no form says.

        Args:
            examples: Registered names with keywords, for `register`.
        """
        return handler_source(self.cls, self.rows, str(self), examples or {})
