"""List the architectures that are supported, and how each follows the image size."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence

import timm
from timm.models import _registry
from torch import nn

from timm_resize.core.registry import Handler, handler_for, handlers

EXAMPLE = "timm-resize families"

HEADER = ("class", "models", "state", "method", "sizes")

NARROW = 12
"""Columns that a table needs no wrapping below, in characters."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--layers", action="store_true", help="list the layers with a handler of their own instead")


def run(args: argparse.Namespace) -> None:
    """Print the table, as wide as it is in a pipe, wrapped on a terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    chosen = [h for h in handlers() if h.is_model != args.layers]
    rows = [(h.state or "none", h.method or "-", h.sizes) for h in chosen]
    if args.layers:
        names = [f"{h.cls.__module__.rpartition('.')[2]}.{h.cls.__name__}" for h in chosen]
        print(_table([(HEADER[0], *HEADER[2:]), *((n, *r) for n, r in zip(names, rows, strict=True))], width))
        return
    counts = model_counts()
    heads = [(h.cls.__name__, str(counts[h.cls] or "-")) for h in chosen]
    print(_table([HEADER, *(head + row for head, row in zip(heads, rows, strict=True))], width))
    print(f"\n{sum(counts.values())} of {len(timm.list_models())} registered models")


def model_counts() -> Counter[type]:
    """Return the number of registered timm models per handler class, where that is clear without building them.

    It is clear for a timm module whose model classes all have the same handler.
    """
    counts: Counter[type] = Counter()
    current = set(timm.list_models())
    for module, names in _registry._module_to_models.items():
        found = _handlers_in(module)
        if len(found) == 1:
            counts[found[0].cls] += len(current & set(names))
    return counts


def _handlers_in(module: str) -> list[Handler]:
    source = f"timm.models.{module}"
    found_there = vars(sys.modules[source]) if source in sys.modules else {}  # a model registered from elsewhere
    classes = [c for c in found_there.values() if isinstance(c, type) and issubclass(c, nn.Module)]
    models = [c for c in classes if hasattr(c, "reset_classifier")]
    own = [c for c in models if c.__module__ == source] or models
    found = {h.cls: h for c in own if (h := handler_for(c)) is not None}
    return list(found.values())


def _table(rows: Sequence[tuple[str, ...]], width: int | None) -> str:
    """Align columns; cells are wrapped, the widest column first, where the table exceeds `width` characters."""
    columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    while width is not None and sum(columns) + 2 * (len(columns) - 1) > width and max(columns) > NARROW:
        columns[columns.index(max(columns))] -= 1
    lines = []
    for row in (rows[0], tuple("-" * c for c in columns), *rows[1:]):
        cells = [textwrap.wrap(cell, c) or [""] for cell, c in zip(row, columns, strict=True)]
        for i in range(max(map(len, cells))):
            parts = ((cell[i] if i < len(cell) else "").ljust(c) for cell, c in zip(cells, columns, strict=True))
            lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
