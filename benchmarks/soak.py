"""Random sequences of steps for as long as asked, on every family's examples; prints counts and violations.

python benchmarks/soak.py --steps 10000
python benchmarks/soak.py --minutes 5 --seed 7
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.helpers.steps import EXAMPLES, STEPS, Sequence


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    pick, counts, violations, sequences = random.Random(args.seed), Counter[str](), [], 0
    end, names = time.time() + 60 * args.minutes, sorted(EXAMPLES)
    while sum(counts[s] for s in STEPS) < args.steps and time.time() < end:
        name, seed = names[sequences % len(names)], pick.randrange(2**31)
        taken: list[str] = []
        try:
            sequence = Sequence(name, seed)
            for _ in range(10):
                taken.append(pick.choice(STEPS))
                sequence.run(taken[-1])
            counts += sequence.counts
        except Exception:
            violations.append((name, seed, taken))
            print(f"violation: {name}, seed {seed}, steps {taken}\n{traceback.format_exc()}", flush=True)
        sequences += 1
    print(
        f"{sequences} sequences on {min(sequences, len(names))} models, {sum(counts[s] for s in STEPS)} steps, "
        f"{counts['faults']} failures injected, {len(violations)} violations"
    )
    print({step: counts[step] for step in STEPS})
    return int(bool(violations))


if __name__ == "__main__":
    raise SystemExit(main())
