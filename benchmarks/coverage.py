"""Which registered models take which sizes: ours beside stock timm, on the meta device.

For every name of `timm.list_models()`: `create_model(img_size=)` and `set_input_size` at a larger, a smaller, a
non-square and an odd size, each followed by a forward pass, and the same for stock. A result is a line of JSON in
--results, so an interrupted sweep goes on where it stopped; --report writes the table from what is there.

    python benchmarks/coverage.py --every 10 --workers 2
    python benchmarks/coverage.py --report docs/coverage.md
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import timm_resize
from timm_resize.locate import current_size, model_handler

Size = tuple[int, int]
KINDS = ("larger", "smaller", "wide", "tall", "odd")


def attempt(action: Callable[[], Any]) -> str:
    """Return 'ok', or the error's type and first line."""
    try:
        action()
    except timm_resize.InvalidSizeError as error:
        return f"InvalidSizeError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return "ok"


@torch.no_grad()
def forward(model: nn.Module, size: Size) -> None:
    """Run a batch of one on the meta device."""
    channels = getattr(model, "in_chans", 3)
    model.eval()(torch.empty(1, channels, *size, device="meta"))


def sizes_of(model: nn.Module) -> dict[str, Size]:
    """Return a valid size of each kind, and an odd one that need not be valid."""
    h, w = current_size(model) or (224, 224)

    def near(size: Size) -> Size:
        found = timm_resize.nearest_sizes(model, size)
        return found[0] if found else size

    large, small = near((h + 64, h + 64)), near((max(h - 64, 32),) * 2)
    return {"larger": large, "smaller": small, "wide": near((h, large[1])), "tall": near((large[0], w)),
            "odd": (h + 6, h + 6)}  # fmt: skip


def sweep(name: str) -> dict[str, Any]:
    """Try one model every way."""
    start = time.time()
    warnings.simplefilter("ignore")
    model = timm.create_model(name, device="meta")
    handler = model_handler(model)
    row: dict[str, Any] = {"name": name, "class": type(model).__name__, "family": handler and handler.cls.__name__}
    row["stock method"] = hasattr(model, "set_input_size")
    if handler is None:
        return {**row, "seconds": time.time() - start}
    native, sizes = current_size(model), sizes_of(model)
    for kind, size in sizes.items():
        built: list[nn.Module] = []

        def create(size: Size = size, built: list[nn.Module] = built) -> None:
            built.append(timm_resize.create_model(name, img_size=size, device="meta"))
            forward(built[0], size)

        def stock(size: Size = size) -> None:
            forward(timm.create_model(name, img_size=size, device="meta"), size)

        def resize(size: Size = size, built: list[nn.Module] = built) -> None:
            timm_resize.resize_(model, size)
            if not built or shapes(model) != shapes(built[0]):  # the same structure runs alike
                forward(model, size)

        row[kind] = {"size": size, "create": attempt(create), "set": attempt(resize), "stock": attempt(stock)}
    row["back"] = attempt(lambda: timm_resize.resize_(model, native))
    return {**row, "seconds": time.time() - start}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters and buffers."""
    return {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}


def works(outcome: str, odd: bool) -> bool:
    """Whether an outcome is what is promised: it runs, or for an odd size a clear error names the nearest."""
    return outcome == "ok" or (odd and outcome.startswith("InvalidSizeError") and "Use " in outcome)


def report(rows: list[dict[str, Any]]) -> str:
    """Return a table with a row per family: models, and how many work, ours and stock's."""
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        families[row["family"] or f"{row['class']} (none)"].append(row)
    lines = ["| family | models | " + " | ".join(f"{k}: create / set / stock" for k in KINDS) + " |",
             "| --- | --- |" + " --- |" * len(KINDS)]  # fmt: skip
    totals = [[0, 0, 0] for _ in KINDS]
    for family, members in sorted(families.items()):
        cells = []
        for i, kind in enumerate(KINDS):
            done = [r[kind] for r in members if kind in r]
            counts = [sum(works(d[way], kind == "odd") for d in done) for way in ("create", "set")]
            counts.append(sum(d["stock"] == "ok" for d in done))
            totals[i] = [a + b for a, b in zip(totals[i], counts, strict=True)]
            cells.append(" / ".join(map(str, counts)))
        lines.append(f"| {family} | {len(members)} | " + " | ".join(cells) + " |")
    lines.append(f"| **all** | {len(rows)} | " + " | ".join(" / ".join(map(str, t)) for t in totals) + " |")
    return "\n".join(lines)


def quiet() -> None:
    """Set a worker up: one thread, no log lines."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; default all registered")
    parser.add_argument("--every", type=int, default=1, help="take every N-th name only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--report", type=Path, help="write the table of --results here, sweep nothing")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    if not args.report:
        done = {row["name"] for row in rows}
        names = [n for n in (args.names or timm.list_models())[:: args.every] if n not in done]
        start = time.time()
        with multiprocessing.get_context("spawn").Pool(args.workers, quiet, maxtasksperchild=50) as pool, \
                args.results.open("a") as out:  # fmt: skip
            for i, row in enumerate(pool.imap_unordered(sweep, names), 1):
                rows.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
                bar = "#" * (30 * i // len(names))
                print(f"\r[{bar:<30}] {i}/{len(names)} {time.time() - start:.0f} s", end="", file=sys.stderr)
        print(file=sys.stderr)
    for row in rows:
        bad = [f"{k} {way} {row[k]['size']}: {row[k][way]}" for k in KINDS if k in row for way in ("create", "set")
               if not works(row[k][way], k == "odd")]  # fmt: skip
        for line in bad if row["family"] else ["no handler"]:
            print(f"{row['name']}: {line}")
    table = report(rows)
    print(table)
    if args.report:
        args.report.write_text(
            f"# Coverage\n\nMade by `benchmarks/coverage.py` with timm {timm.__version__}.\n\n{table}\n"
        )


if __name__ == "__main__":
    main()
