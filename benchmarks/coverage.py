"""Which registered models take which sizes: ours beside stock timm, on the meta device.

For every name of `timm.list_models()`: `create_model(img_size=)` and `set_input_size` at a larger, a smaller, two
non-square and an odd size, feature extractors at a non-square one, each followed by a forward pass, the same for
stock, and whether stock rebuilds the resized model from its exported config. Random initialisation is skipped. A
result is a line of JSON in --results, so an interrupted sweep goes on where it stopped; --report writes the tables.
Exits with 1 when a model falls short.

    python benchmarks/coverage.py --workers 2 --report docs/coverage.md
    python benchmarks/coverage.py --every 10 --smallest
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import weight_init
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

import timm_resize
from timm_resize.core.find import current_size, model_handler
from timm_resize.core.registry import families

Size = tuple[int, int]
KINDS = ("larger", "smaller", "wide", "tall", "odd")
SMALLEST = Path(__file__).with_name("coverage_smallest.txt")
"""The smallest model of every class, written with --report after a full sweep."""

UNSIZED = {
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_resize_chain",
    "pretrained_cfg",
    "default_cfg",
    "_model_args",
    "_traits",
    "input_guard",
}


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


def structure(model: nn.Module) -> Any:
    """Return what decides whether forward runs: shapes, and the plain attributes of every module."""
    shapes = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    attributes = [
        (path, name, repr(value))
        for path, module in model.named_modules()
        for name, value in sorted(module.__dict__.items())
        if name not in UNSIZED and isinstance(value, (int, float, str, bool, tuple, list, torch.Size, type(None)))
    ]
    return shapes, attributes


def sizes_of(model: nn.Module) -> dict[str, Size]:
    """Return a valid size of each kind, and an odd one that need not be valid."""
    h, w = current_size(model) or (224, 224)

    def near(size: Size) -> Size:
        found = timm_resize.nearest_sizes(model, size)
        return found[0] if found else size

    large, small = near((h + 64, h + 64)), near((max(h - 64, 32),) * 2)
    return {
        "larger": large,
        "smaller": small,
        "wide": near((h, large[1])),
        "tall": near((large[0], w)),
        "odd": (h + 6, h + 6),
    }


def three_ways(name: str, size: Size, model: nn.Module, **kwargs: Any) -> tuple[dict[str, Any], nn.Module | None]:
    """Create at `size`, resize `model` to it, and let stock create; a forward for every distinct structure."""
    ran: list[Any] = []
    built: list[nn.Module] = []
    as_built: list[dict[str, Any]] = []

    def run(made: nn.Module) -> None:
        inside = structure(made)
        if inside not in ran:
            forward(made, size)
            ran.append(inside)

    def create() -> None:
        made = timm_resize.create_model(name, img_size=size, device="meta", **kwargs)
        as_built.append(structure(made)[0])
        run(made)
        built.append(made)

    def resize() -> None:
        timm_resize.resize_(model, size)
        run(model)

    def stock() -> None:
        theirs = timm.create_model(name, img_size=size, device="meta", **kwargs)
        shapes = structure(theirs)[0]  # before forward, which may fill buffers
        run(theirs)
        if built and shapes != as_built[0]:
            both = {**shapes, **as_built[0]}
            row["differs"] = next(k for k in both if shapes.get(k) != as_built[0].get(k))

    row: dict[str, Any] = {"size": size, "create": attempt(create), "set": attempt(resize)}
    row["stock"] = attempt(stock)
    return row, built[0] if built else None


def reload(model: nn.Module, size: Size) -> str:
    """Whether stock builds the same model from the config that timm exports for it, and runs it at its size."""

    def rebuild() -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_config_for_hf(model, f"{folder}/config.json")
            again = timm.create_model(f"local-dir:{folder}", device="meta")
        ours, theirs = ({k: tuple(t.shape) for k, t in m.state_dict().items()} for m in (model, again))
        if ours != theirs:
            key = next(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
            raise ValueError(f"{key} is {ours.get(key)}, stock builds {theirs.get(key)}")
        if structure(model) != structure(again):
            forward(again, size)

    return attempt(rebuild)


def sweep(name: str) -> dict[str, Any]:
    """Try one model every way."""
    start = time.time()
    warnings.simplefilter("ignore")
    model = timm.create_model(name, device="meta")
    handler = model_handler(model)
    row: dict[str, Any] = {"name": name, "class": type(model).__name__, "family": handler and handler.cls.__name__}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["stock method"] = hasattr(model, "set_input_size")
    if handler is None:
        return {**row, "seconds": time.time() - start}
    native, sizes = current_size(model), sizes_of(model)
    for kind, size in sizes.items():
        row[kind], made = three_ways(name, size, model)
        if made is not None and kind in ("larger", "wide") and handler.state:
            row[f"reload {kind}"] = reload(made, size)
    row["back"] = attempt(lambda: timm_resize.resize_(model, native))
    try:
        features = timm.create_model(name, features_only=True, device="meta")
        forward(features, native or (224, 224))
    except Exception:  # whatever a class raises that has no features, or whose features read values
        features = None
    if features is not None:
        row["features"] = three_ways(name, sizes["wide"], features, features_only=True)[0]
    return {**row, "seconds": time.time() - start}


def works(outcome: str, odd: bool) -> bool:
    """Whether an outcome is what is promised: it runs, or for an odd size a clear error names the nearest."""
    return outcome == "ok" or (odd and outcome.startswith("InvalidSizeError") and "Use " in outcome)


def report(rows: list[dict[str, Any]]) -> str:
    """Return the counts per family, ours and stock's, and what each family is registered with."""
    kinds = (*KINDS, "features")
    members: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        members[row["family"] or f"{row['class']} (none)"].append(row)
    lines = ["| family | models | " + " | ".join(kinds) + " |", "| --- | --- |" + " --- |" * len(kinds)]
    for family, group in [*sorted(members.items()), ("**all**", rows)]:
        cells = []
        for kind in kinds:
            done = [r[kind] for r in group if kind in r]
            counts = [sum(works(d[way], kind == "odd") for d in done) for way in ("create", "set")]
            counts.append(sum(d["stock"] == "ok" for d in done))
            cells.append(" / ".join(map(str, counts)) + (f" of {len(done)}" if len(done) < len(group) else ""))
        lines.append(f"| {family} | {len(group)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| family | depends on the size | method | valid sizes | stock method | stock reloads |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for handler in families():
        group = members.get(handler.cls.__name__, [])
        if not group:
            continue
        again = [
            f"{sum(r.get(key) == 'ok' for r in group)} of {len(group)}" if handler.state else "all"
            for key in ("reload larger", "reload wide")
        ]
        state, method = (text.replace("|", "\\|") for text in (handler.state or "nothing", handler.method or "-"))
        lines.append(
            f"| {handler.cls.__name__} | {state} | {method} | {handler.sizes} "
            f"| {'yes' if group[0]['stock method'] else 'no'} | {', '.join(again)} |"
        )
    return "\n".join(lines)


HEADER = """# Coverage

Made by `benchmarks/coverage.py` with timm {version}: every registered model ({count}) on the meta device, {minutes:.0f}
minutes of processor time. Counts are `create_model(img_size=)` / `set_input_size` / stock's `create_model(img_size=)`:
models that build and whose forward runs at the size. Sizes are about 64 pixels larger or smaller than the model's own,
both non-square ways, and an odd size (6 pixels more), where an `InvalidSizeError` that names valid sizes counts for us.
*features* is `features_only=True` at the non-square size, counted where stock has it. For stock "runs" says nothing of
the values. *stock reloads*: of the models resized to the larger square, and of those to a non-square size, how many
stock timm builds with the same tensors, and runs, from the exported config. Models of torchvision, open_clip and
transformers have [a table of their own](libraries.md).

"""


def finish(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the report, and the smallest model of every class after a full sweep."""
    minutes = sum(r["seconds"] for r in rows) / 60
    head = HEADER.format(version=timm.__version__, count=len(rows), minutes=minutes)
    path.write_text(f"{head}{report(rows)}\n")
    if {r["name"] for r in rows} >= set(timm.list_models()):
        smallest: dict[str, dict[str, Any]] = {}
        for row in sorted(rows, key=lambda r: (r["parameters"], r["name"])):
            smallest.setdefault(row["class"], row)
        SMALLEST.write_text("".join(f"{r['name']}\n" for r in sorted(smallest.values(), key=lambda r: r["name"])))


def like(x: Tensor, channels: Sequence[int], weight: Tensor | None, out: Sequence[int] | None = None) -> Tensor:
    """Return what a layer over the last or second `channels` makes of `x` without values, once they are checked."""
    if weight is not None and tuple(channels) != tuple(weight.shape):
        raise RuntimeError(f"a layer for {tuple(weight.shape)} channels was given {tuple(x.shape)}")
    return x.new_empty(x.shape if out is None else (*x.shape[:-1], *out))


def quiet() -> None:
    """Set a worker up: one thread, no random initialisation, no log lines.

    Norms and linear layers, which torch computes step by step in Python on the meta device, are a check of shapes:
    that halves the time of a sweep.
    """
    torch.set_num_threads(1)
    functions: Any = nn.functional
    functions.batch_norm = lambda x, mean, variance, *args, **kwargs: like(x, x.shape[1:2], mean)
    functions.layer_norm = lambda x, shape, weight=None, *args, **kwargs: like(x, x.shape[-len(shape) :], weight)
    functions.linear = lambda x, weight, bias=None: like(x, x.shape[-1:], weight[0], weight.shape[:1])
    functions.gelu = lambda x, approximate="none": like(x, (), None)
    for module in (nn.init, weight_init):
        for name in [n for n in vars(module) if n.endswith("_") and not n.startswith("__")]:
            setattr(module, name, lambda tensor, *args, **kwargs: tensor)
    logging.disable(logging.WARNING)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; default all registered")
    parser.add_argument("--every", type=int, default=1, help="take every N-th name only")
    parser.add_argument("--smallest", action="store_true", help="and the smallest model of every class")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--report", type=Path, help="write the tables of --results here")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {row["name"] for row in rows}
    wanted = [*(args.names or timm.list_models())[:: args.every]]
    wanted += SMALLEST.read_text().split() if args.smallest else []
    names, start = [n for n in dict.fromkeys(wanted) if n not in done and timm.is_model(n)], time.time()
    with (
        multiprocessing.get_context("spawn").Pool(args.workers, quiet, maxtasksperchild=50) as pool,
        args.results.open("a") as out,
    ):
        for i, row in enumerate(pool.imap_unordered(sweep, names), 1):
            rows.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
            bar = "#" * (30 * i // len(names))
            print(f"\r[{bar:<30}] {i}/{len(names)} {time.time() - start:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    short = 0
    for row in rows:
        bad = [
            f"{k} {way} {row[k]['size']}: {row[k][way]}"
            for k in (*KINDS, "features")
            if k in row
            for way in ("create", "set")
            if not works(row[k][way], k == "odd")
        ]
        bad += [
            f"{k} {row[k]['size']}: {row[k]['differs']} is not shaped as stock's, which runs"
            for k in (*KINDS, "features")
            if "differs" in row.get(k, {}) and k != "odd"  # at odd sizes stock's constructors and forwards disagree
        ]
        bad += [f"back: {row['back']}"] if row.get("back", "ok") != "ok" else []
        for line in bad if row["family"] else ["no handler"]:
            print(f"{row['name']}: {line}")
            short += 1
    print(report(rows))
    print(f"\n{len(rows)} models, {short} shortfalls")
    if args.report:
        finish(rows, args.report)
    return int(short > 0)


if __name__ == "__main__":
    raise SystemExit(main())
