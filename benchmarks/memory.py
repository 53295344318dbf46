"""Compare the memory that a plan says it takes with the peak of a process that applies it. Linux.

    python benchmarks/memory.py [NAME ...]

Each case runs in a process of its own. `said` is `needed(model, plan)`, `measured` how far the process' resident memory
rose above what it was before the resize, `ratio` the first by the second: below 1 a resize that was let through may
be killed, far above 1 one is refused that would have worked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "positions": ("vit_tiny_patch16_224", {"depth": 1}, {"img_size": 6400}),
    "positions by patch": ("vit_tiny_patch16_224", {"depth": 1}, {"img_size": 1600, "patch_size": 4}),
    "tokens by tokens": ("resmlp_12_224", {}, {"img_size": 896}),
    "tokens by features": ("mixer_s32_224", {}, {"img_size": 4096}),
    "index of offsets": ("levit_128s", {}, {"img_size": 1280}),
    "index of a window": ("beit_base_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 2}, {"img_size": 1280}),
    "masks": ("swin_tiny_patch4_window7_224", {"depths": (2, 2, 2, 2)}, {"img_size": 1024, "window_size": 32}),
    "one window": ("swin_tiny_patch4_window7_224", {"depths": (2, 2, 2, 2)}, {"img_size": 256, "window_size": 64}),
    "a table an axis": ("mvitv2_tiny", {}, {"img_size": 65536}),
    "nothing": ("resnet18", {}, {"img_size": 65536}),
}
"""What is large → model, how it is built, what it is resized to."""


def measure(name: str, kwargs: dict[str, Any], wanted: dict[str, Any]) -> tuple[int, int]:
    """Resize a model in this process; return the bytes that the plan says, and those that the process' peak rose by."""
    import timm

    import timm_resize
    from timm_resize.core.memory import needed

    warnings.simplefilter("ignore")
    model = timm.create_model(name, **kwargs)
    timm_resize.resize_(model, timm_resize.nearest_sizes(model, 256)[0])  # loads what a first resize loads
    said = sum(needed(model, timm_resize.plan_resize(model, **wanted)).values())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    timm_resize.resize_(model, **wanted)
    return said, status("VmHWM") - before


def status(line: str) -> int:
    """Return a number of bytes from what the system knows of this process."""
    lines = dict(text.split(":", 1) for text in Path("/proc/self/status").read_text().splitlines())
    return int(lines[line].split()[0]) * 1024


def main() -> None:
    """Run the cases, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(*CASES[given.names[0]])))
        return
    print("| what is large | model | said, MB | measured, MB | ratio |\n| --- | --- | --- | --- | --- |")
    for name in given.names:
        run = subprocess.run([sys.executable, __file__, "--here", name], capture_output=True, text=True)
        if run.returncode:
            print(f"| {name} | {CASES[name][0]} | {run.stderr.splitlines()[-1]} | | |", flush=True)
            continue
        said, measured = json.loads(run.stdout.splitlines()[-1])
        ratio = f"{said / measured:.2f}" if measured > 1 << 24 else "-"
        print(f"| {name} | {CASES[name][0]} | {said / 1e6:.0f} | {measured / 1e6:.0f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
