"""Small to large against constantly large, on scikit-learn's digits: accuracy, seconds, FLOPs, and the dip at a switch.

Every way trains as many epochs, ends at the full size and is tested there. The dip is the test accuracy right after the
last switch, before any training at the full size, and after the first epoch there, with the optimizer's state carried
over and with a new optimizer.

    python benchmarks/progressive.py
    python benchmarks/progressive.py --families vit --seeds 1 --epochs 6
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from digits import FAMILIES, Digits, Family, accuracy, at_size, batches, logits
from torch import nn

import timm_resize
from timm_resize.cost import measure

CHOSEN = ("resnet", "vit", "swin", "levit", "mixer")
WAYS = ("large", "small to large", "small to large, new optimizer")


@dataclass
class Run:
    """What one training gave."""

    accuracy: float = 0.0
    seconds: float = 0.0
    flops: float = 0.0
    dip: list[float] = field(default_factory=list)


def train(family: Family, data: Digits, way: str, seed: int, epochs: int) -> Run:
    """Train one model one way."""
    torch.manual_seed(seed)
    full, half = (family.size, family.size), (family.size // 2, family.size // 2)
    sizes = timm_resize.SizeSchedule.steps(
        {0: half, epochs * 2 // 3: full} if way != "large" else {0: full}, epochs=epochs
    )
    model = timm_resize.create_model(family.name, num_classes=10, in_chans=1, img_size=full, **family.kwargs)
    sizes = sizes.snapped(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * -(-len(data.train[1]) // 64)
    generator, run, step = torch.Generator().manual_seed(seed), Run(), 0
    if sizes.size(0) != full:
        timm_resize.resize_(model, sizes.size(0), **family.options(sizes.size(0)))
    for epoch in range(epochs):
        size, start = sizes.size(epoch), time.perf_counter()
        switched = epoch > 0 and size != sizes.size(epoch - 1)
        if switched:
            timm_resize.resize_(model, size, optimizer=optimizer, **family.options(size))
            if way.endswith("new optimizer"):
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
            run.seconds += time.perf_counter() - start
            run.dip.append(accuracy(model, at_size(data.test[0], full), data.test[1]))
            start = time.perf_counter()
        flops = 3 * measure(model).flops  # forward, and twice that for backward
        model.train()
        for images, labels in batches(data.train, size, generator):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1.0, 10 * step / steps) * (1 - step / steps)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits(model(images)), labels).backward()
            optimizer.step()
            step += 1
            run.flops += flops * len(labels)
        run.seconds += time.perf_counter() - start
        if switched:
            run.dip.append(accuracy(model, at_size(data.test[0], full), data.test[1]))
    run.accuracy = accuracy(model, at_size(data.test[0], full), data.test[1])
    return run


def row(name: str, way: str, runs: list[Run]) -> str:
    """Format the mean ± standard deviation over the seeds."""

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}" if values else "-"

    dips = [cell([r.dip[i] for r in runs if r.dip]) for i in (0, 1)]
    tera = statistics.mean(r.flops for r in runs) / 1e12
    cells = [cell([r.accuracy for r in runs]), cell([r.seconds for r in runs]), f"{tera:.2f}", *dips]
    return f"| {name} | {way} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=CHOSEN, default=list(CHOSEN))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    logging.getLogger("timm").setLevel(logging.ERROR)
    data = Digits()
    lines = [
        "| model | way | accuracy, % | seconds | TFLOPs | right after the switch, % | an epoch later, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    print(*lines, sep="\n", flush=True)
    for name in args.families:
        family: Any = FAMILIES[name]
        for way in WAYS:
            lines.append(row(name, way, [train(family, data, way, seed, args.epochs) for seed in range(args.seeds)]))
            print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
