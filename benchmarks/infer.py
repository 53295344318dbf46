"""`infer` alone on every family of timm whose classes take `img_size`: is what it finds what its handler does?

Each example is built with random weights and resized twice, to a square and to a wide size: by its handler, and, with
all handlers switched off, by what `infer` made of its builds. Tensors are compared bit for bit.

    python benchmarks/infer.py                 # the table of docs/extend/infer.md
    python benchmarks/infer.py --time          # time and peak memory of infer alone
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import resource
import time
from collections import Counter

import timm
import torch
from torch import nn

import timm_resize
from timm_resize.builds.rules import generic
from timm_resize.core.planner import takes_img_size
from timm_resize.errors import ResizeError

OFF = [handler.cls for handler in timm_resize.registry.handlers()]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers, those that no state dict holds too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    """Return the names of tensors that are not the same bit for bit."""
    x, y = tensors(a), tensors(b)
    return [n for n in {**x, **y} if n not in x or n not in y or not torch.equal(x[n], y[n])]


def targets(model: nn.Module) -> list[tuple[int, int]]:
    """Return a square and a wide size that the handler takes."""
    side = timm_resize.plan_resize(model).new_size[0]
    square = timm_resize.nearest_sizes(model, side * 9 // 7)[0]
    return [square, *timm_resize.nearest_sizes(model, (side, square[0]))[:1]]


def compare(name: str, kwargs: dict[str, object]) -> tuple[str, str]:
    """Return one of `RANK` for an example, and why."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    fixed = type(model).__name__ in ("SwinTransformer", "SwinTransformerV2")  # whose builds keep their windows
    policy = {"window_policy": "keep"} if fixed else {}
    by_handler = {}
    for size in targets(model):
        by_handler[size] = copy.deepcopy(model)
        timm_resize.resize_(by_handler[size], size, **policy)
    with timm_resize.registry.override(*OFF):
        seen = timm_resize.infer(lambda img_size: timm.create_model(name, img_size=img_size, **kwargs), register=False)
        asked = {row.name: row.choices for row in seen.rows if row.problem}
        if set(seen.problems) != {row.problem for row in seen.rows if row.choices}:
            return "refused", "; ".join(seen.problems)
    outcome = ("refused", "; ".join(seen.problems))
    words = sorted(set(itertools.chain.from_iterable(asked.values()))) if asked else [""]
    for word in words:
        hints = {generic(key): word for key, choices in asked.items() if word in choices}  # as the refusal says
        outcome = max(by_builds(name, kwargs, model, by_handler, hints), outcome, key=lambda o: RANK.index(o[0]))
    return outcome


RANK = ["refused", "DIFFERENT", "equal with a hint where built", "equal where built", "equal with a hint", "equal"]
"""From the worst. 'where built': stock's constructor takes the square size alone, and the wide one is refused."""


def by_builds(name, kwargs, model, by_handler, hints) -> tuple[str, str]:
    """Resize as `infer` has it, and compare."""
    refused, hint = [], " with a hint" if hints else ""
    for size, want in by_handler.items():
        with timm_resize.registry.override(*OFF):
            got = copy.deepcopy(model)
            try:
                timm_resize.infer(lambda img_size: timm.create_model(name, img_size=img_size, **kwargs), hints=hints)
                timm_resize.resize_(got, size)
            except ResizeError as error:
                refused.append(f"at {size}: {error}")
                continue
        if wrong := differing(got, want):
            return ("refused" if hints else "DIFFERENT"), f"at {size}: {', '.join(wrong[:3])}, with {hints}"
    why = "; ".join((*refused, *filter(None, [str(hints or "")])))
    if len(refused) == len(by_handler):
        return "refused", why
    return f"equal{hint}{' where built' if refused else ''}", why


def timings() -> None:
    """Print time of the processor, also in stock builds, wall time, and peak memory beside one stock build's."""
    for name in ("vit_base_patch16_224", "swin_base_patch4_window7_224"):
        timm_resize.infer(lambda s: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=s), register=False)
        start = time.process_time()
        timm.create_model(name)
        built = time.process_time() - start
        before, wall, start = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            time.perf_counter(),
            time.process_time(),
        )
        timm_resize.infer(lambda s, name=name: timm.create_model(name, img_size=s), register=False)
        took, wall = time.process_time() - start, time.perf_counter() - wall
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"{name}: {took:.1f} s of processor, {took / built:.1f} stock builds; {wall:.1f} s at load "
            f"{os.getloadavg()[0]:.0f}; {more:+.0f} MiB beyond one stock build"
        )


def main() -> None:
    """Print one line for each example, then the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="time and memory alone")
    parser.add_argument("names", nargs="*", help="examples; all if none is given")
    args = parser.parse_args()
    if args.time:
        timings()
        return
    counts, classes = Counter(), {}
    for family in timm_resize.families():
        if not takes_img_size(family.cls):
            continue
        for name, kwargs in family.examples.items():
            if args.names and name not in args.names:
                continue
            try:
                outcome, why = compare(name, dict(kwargs))
            except ResizeError as error:
                outcome, why = "refused", str(error)
            counts[outcome] += 1
            classes.setdefault(family.cls.__name__, []).append(outcome)
            print(f"{family.cls.__name__:24} {name:42} {outcome:29} {why[:300]}", flush=True)
    print(dict(counts), f"of {sum(counts.values())} examples of {len(classes)} classes")
    print("classes equal in all:", sum(set(o) == {"equal"} for o in classes.values()))


if __name__ == "__main__":
    main()
