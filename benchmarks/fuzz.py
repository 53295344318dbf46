"""Random surgery on random models, brought to a random size by a random way, judged against plain models.

python benchmarks/fuzz.py --steps 20000 --workers 4 --log fuzz.jsonl    goes on where an earlier run was ended
python benchmarks/fuzz.py --seed 123                                    one step again, with its traceback
python benchmarks/fuzz.py --surgeries pruned tied --ways MultiSize      steps drawn from these alone

Seeds are drawn anew in every run. A step is right; refused by a ResizeError with nothing changed; inapplicable, where
the surgery alone breaks the model; without reference, where the bare model is refused; or a violation.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.helpers.surgery import SURGERIES
from tests.helpers.trial import RESULTS, WAYS, Choices, take_step


def work(log: Path, steps: int, end: float, choices: Choices) -> None:
    """Take steps until there are as many in the log, from all processes that write to it."""
    log.touch()
    while log.read_bytes().count(b"\n") < steps and time.time() < end:
        outcome = take_step(random.SystemRandom().randrange(2**31), choices)
        with log.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        if outcome.result == "violation":
            print(f"violation: --seed {outcome.seed}  # {outcome.about}\n    {outcome.detail}", flush=True)


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def report(steps: list[dict[str, Any]]) -> int:
    """Print counts by surgery, way and family; returns the number of violations."""
    for title, key in (("surgery", "surgeries"), ("way", "way"), ("family", "family")):
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for step in steps:
            for name in step[key] if isinstance(step[key], list) else [step[key] or "(none)"]:
                counts[name][step["result"]] += 1
        print(f"\n| {title} | {' | '.join(RESULTS)} |\n|{' --- |' * (len(RESULTS) + 1)}")
        for name in sorted(counts):
            print(f"| {name} | {' | '.join(str(counts[name][result]) for result in RESULTS)} |")
    total = Counter(step["result"] for step in steps)
    print(f"\n{len(steps)} steps: " + ", ".join(f"{total[result]} {result}" for result in RESULTS))
    for step in steps:
        if step["result"] == "violation":
            print(f"python benchmarks/fuzz.py --seed {step['seed']}  # {step['model']}: {step['detail'][:200]}")
    return total["violation"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--log", type=Path, help="a line of JSON for each step; by default a file of this run")
    parser.add_argument("--seed", type=int, help="take this one step")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="draw from these examples")
    parser.add_argument("--surgeries", nargs="+", default=list(SURGERIES), choices=list(SURGERIES), metavar="NAME")
    parser.add_argument("--ways", nargs="+", default=[], choices=list(WAYS), metavar="NAME")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # compiled models run as they are
    choices = Choices(tuple(args.models), tuple(args.surgeries), tuple(args.ways))
    if args.seed is not None:
        print(take_step(args.seed, choices, raises=True))
        return 0
    end = time.time() + 60 * args.minutes
    if args.work:
        work(args.log, args.steps, end, choices)
        return 0
    log = args.log or Path(tempfile.mkstemp(suffix=".jsonl")[1])
    command = [sys.executable, *sys.argv, "--work", "--log", str(log)]
    workers = [subprocess.Popen(command) for _ in range(args.workers)]
    died = sum(worker.wait() != 0 for worker in workers)
    if died:
        print(f"{died} workers died")
    return int(report(read(log)) + died > 0)


if __name__ == "__main__":
    raise SystemExit(main())
