"""List the architectures that are supported, and how each follows the image size."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from typing import TYPE_CHECKING

from timm_resize.cli._common import add_json_argument, table

if TYPE_CHECKING:
    from timm_resize.core.registry import Handler

EXAMPLE = "timm-resize families"

HEADER = ("class", "models", "state", "method", "sizes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--layers", action="store_true", help="list the layers with a handler of their own instead")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Print the table, as wide as it is in a pipe, wrapped on a terminal."""
    import timm

    from timm_resize.core.registry import handlers

    chosen = [h for h in handlers() if h.is_model != args.layers]
    counts = {} if args.layers else model_counts()
    names = [
        f"{h.cls.__module__.rpartition('.')[2]}.{h.cls.__name__}" if args.layers else h.cls.__name__ for h in chosen
    ]
    if args.json:
        rows = zip(names, chosen, strict=True)
        print(json.dumps([_record(name, h, counts.get(h.cls)) for name, h in rows]))
        return
    header = HEADER[:1] + HEADER[2:] if args.layers else HEADER
    cells = [
        (name, *(() if args.layers else (str(counts.get(h.cls) or "-"),)), h.state or "none", h.method or "-", h.sizes)
        for name, h in zip(names, chosen, strict=True)
    ]
    print(table([header, *cells], shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    if not args.layers:
        print(f"\n{sum(counts.values())} of {len(timm.list_models())} registered models")


def _record(name: str, handler: Handler, models: int | None) -> dict[str, object]:
    """Return a row of the table for JSON, its empty cells null."""
    rule = {"state": handler.state or None, "method": handler.method or None, "sizes": handler.sizes or None}
    return {"class": name, "models": models, **rule, "options": list(handler.options)}


def model_counts() -> Counter[type]:
    """Return the number of registered timm models per handler class, where that is clear without building them.

    It is clear for a timm module whose model classes all have the same handler.
    """
    import timm
    from timm.models import _registry

    counts: Counter[type] = Counter()
    current = set(timm.list_models())
    for module, names in _registry._module_to_models.items():
        found = _handlers_in(module)
        if len(found) == 1:
            counts[found[0].cls] += len(current & set(names))
    return counts


def _handlers_in(module: str) -> list[Handler]:
    from torch import nn

    from timm_resize.core.registry import handler_for

    source = f"timm.models.{module}"
    found_there = vars(sys.modules[source]) if source in sys.modules else {}  # a model registered from elsewhere
    classes = [c for c in found_there.values() if isinstance(c, type) and issubclass(c, nn.Module)]
    models = [c for c in classes if hasattr(c, "reset_classifier")]
    own = [c for c in models if c.__module__ == source] or models
    found = {h.cls: h for c in own if (h := handler_for(c)) is not None}
    return list(found.values())
