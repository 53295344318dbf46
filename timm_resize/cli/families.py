"""List the architectures that are supported, and how each follows the image size."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from timm.models import _registry
from torch import nn

from timm_resize.registry import Handler, handler_for, handlers

EXAMPLE = "timm-resize families"

HEADER = ("class", "models", "state", "method", "sizes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments: none."""


def run(args: argparse.Namespace) -> None:
    """Print one table of models and one of layers."""
    registered = handlers()
    counts = model_counts()
    for title, group in (("models", [h for h in registered if h.is_model]),
                         ("layers", [h for h in registered if not h.is_model])):  # fmt: skip
        rows = [(h.cls.__name__, str(counts.get(h.cls, "-")), h.state or "none", h.method or "-", h.sizes) for h in group]
        print(_table([HEADER, *rows] if title == "models" else [_without_count(r) for r in (HEADER, *rows)]))
        print()
    print(f"{sum(counts.values())} of {len(_registry._model_entrypoints)} registered models counted")


def model_counts() -> Counter[type]:
    """Return the number of registered timm models per handler class, where that is clear without building them.

    It is clear for a timm module whose model classes all have the same handler.
    """
    counts: Counter[type] = Counter()
    for module, names in _registry._module_to_models.items():
        found = _handlers_in(module)
        if len(found) == 1:
            counts[found[0].cls] += len(names)
    return counts


def _handlers_in(module: str) -> list[Handler]:
    source = f"timm.models.{module}"
    classes = [c for c in vars(sys.modules[source]).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    models = [c for c in classes if hasattr(c, "reset_classifier")]
    own = [c for c in models if c.__module__ == source] or models
    found = {h.cls: h for c in own if (h := handler_for(c)) is not None}
    return list(found.values())


def _without_count(row: tuple[str, ...]) -> tuple[str, ...]:
    return row[0], *row[2:]


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, tuple("-" * w for w in widths))
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
