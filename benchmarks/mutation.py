"""Small faults put into the package one at a time, each run against the tests that enter the faulty function.

python benchmarks/mutation.py --faults 300 --seed 0 --results mutation.jsonl      a sample of every folder; resumes
python benchmarks/mutation.py --results mutation.jsonl --paths core/plan.py       of these files alone
python benchmarks/mutation.py --results mutation.jsonl --report                   what is known so far

Why our own: cosmic-ray starts one fixed test command for every fault, 9 s of `import timm` each; mutmut forks from a
process that has run the tests, whose caches of matrices hide faults (39 of its first 44 in resample/axis.py survived).
Here one process imports torch and timm, but not this package, and forks a child for each fault.

A first pass runs every test file unchanged and notes, for each test, its CPU time and the functions it enters. A fault
then meets the tests of its function, those of its own test file first, then the quickest, up to a budget of CPU time.
Faults are of a copy of the last commit, made once for a results file; the results continue where they were.
What survives and is no fault stands in mutation_equivalents.txt, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import pytest
import timm  # noqa: F401  what every child needs, and no fault is in it
from faults import Fault, Faults

HERE = Path(__file__).parent
PACKAGE = "timm_resize"
MEMORY = 16 << 30
Place = tuple[str, int]
"""A function: its file and first line."""


class Watch:
    """A pytest plugin: which tests to run in which order, and for each its CPU time, failure, functions entered."""

    def __init__(self, package: Path, order: Sequence[str] | None) -> None:
        self.package, self.order = f"{package}{os.sep}", order
        self.tests: dict[str, tuple[float, list[Place]]] = {}
        self.entered: set[Place] = set()
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.order is not None:
            found = {item.nodeid: item for item in items}
            items[:] = [found[name] for name in self.order if name in found]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.entered, before = set(), os.times()
        if self.order is None:
            sys.settrace(self.enter)
        result = yield
        sys.settrace(None)
        spent = [after - start for after, start in zip(os.times()[:4], before, strict=False)]
        self.tests[item.nodeid] = round(sum(spent), 2), sorted(self.entered)
        return result

    def enter(self, frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if code.co_filename.startswith(self.package):
            self.entered.add((f"{PACKAGE}/{code.co_filename[len(self.package) :]}", code.co_firstlineno))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def in_child(tree: Path, files: Sequence[str], order: Sequence[str] | None, limit: int) -> dict[str, object] | None:
    """Run tests in a forked child on the package as it now stands in the tree; None when it ran out of time."""
    answer = tree / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.chdir(tree)
            os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
            sys.path.insert(0, str(tree))
            sys.dont_write_bytecode = True
            with open(tree / "output.txt", "wb") as output:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
            watch = Watch(tree / PACKAGE, order)
            stop = [] if order is None else ["-x"]
            code = pytest.main(["-n", "0", "-p", "no:cacheprovider", *stop, *files], plugins=[watch])
            assert sys.modules.get(PACKAGE) is None or str(tree) in str(sys.modules[PACKAGE].__file__)
            answer.write_text(json.dumps({"code": int(code), "tests": watch.tests, "failed": watch.failed}))
        finally:
            os._exit(0)
    end = time.monotonic() + 6 * limit
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests started
    return json.loads(answer.read_text()) if answer.exists() else None


def snapshot(tree: Path) -> None:
    """Copy the last commit to a tree of its own; one that is there stays."""
    if not tree.exists():
        tree.mkdir()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=HERE.parent, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x"], cwd=tree, input=archive, check=True)
        subprocess.run([sys.executable, "-m", "compileall", "-q", PACKAGE, "tests"], cwd=tree, check=True)


def folder(path: str) -> str:
    return str(Path(path).parent)


def sampled(tree: Path, paths: Sequence[str], count: int, seed: int) -> list[Fault]:
    """Draw faults: half of them evenly from the folders, half by how many each has; from a file's lines, likewise."""
    by_folder = defaultdict(list)
    for file in sorted((tree / PACKAGE).rglob("*.py")):
        path = str(file.relative_to(tree))
        if not paths or any(path.endswith(p) or path.startswith(f"{PACKAGE}/{p}") for p in paths):
            by_folder[folder(path)] += Faults(path, file.read_bytes()).found
    total = sum(map(len, by_folder.values()))
    chosen = []
    for name, faults in by_folder.items():
        share = count * (1 / len(by_folder) + len(faults) / total) / 2
        chosen += random.Random(f"{seed} {name}").sample(faults, min(round(share), len(faults)))
    return [fault for fault in random.Random(seed).sample(chosen, len(chosen)) if fault.compiles(tree)]


def tests_of(fault: Fault, tests: dict[str, tuple[float, list[Place]]], budget: float) -> list[str]:
    """Return the tests that enter the fault's function, or anything in its file for a fault outside of functions."""
    place = [fault.path, fault.place]
    sees = [
        n for n, (_, places) in tests.items() if any(p == place or (not place[1] and p[0] == place[0]) for p in places)
    ]
    own = f"test_{Path(fault.path).stem}.py"
    sees.sort(key=lambda name: (own not in name, tests[name][0]))
    chosen, spent = [], 0.0
    for name in sees:
        spent += tests[name][0]
        if spent <= budget or not chosen:
            chosen.append(name)
    return chosen


def outcome(fault: Fault, tree: Path, tests: dict[str, tuple[float, list[Place]]], budget: float) -> dict[str, object]:
    """Put a fault in, run its tests, and take it out."""
    names = tests_of(fault, tests, budget)
    if not names:
        return {"outcome": "no test"}
    (old, new), file = fault.source(tree), tree / fault.path
    stat = file.stat()
    file.write_bytes(new)
    os.utime(file, (stat.st_atime, stat.st_mtime + 7 + fault.start))  # so that no compiled file is taken for its own
    try:
        files = sorted({name.split("::")[0] for name in names})
        answer = in_child(tree, files, names, int(60 + 3 * sum(tests[name][0] for name in names)))
    finally:
        file.write_bytes(old)
        os.utime(file, (stat.st_atime, stat.st_mtime))
    if answer is None:
        return {"outcome": "hung", "tests": len(names)}
    by = answer["failed"] or ["collection"]
    return {"outcome": "killed", "by": by[0]} if answer["code"] else {"outcome": "survived", "tests": len(names)}


def equivalents() -> dict[tuple[str, str], str]:
    """Read what is explained: (path, diff) → why."""
    blocks = (HERE / "mutation_equivalents.txt").read_text().strip().split("\n\n")
    parts = [block.splitlines() for block in blocks if block and not block.startswith("#")]
    diffs = [[line for line in lines[1:] if line[:2] in ("- ", "+ ")] for lines in parts]
    return {(p[0], "\n".join(d)): " ".join(p[1 + len(d) :]) for p, d in zip(parts, diffs, strict=True)}


def report(results: list[dict[str, str]]) -> int:
    """Print the table and what survived; returns how many of these nobody explained."""
    known, counts, open_ = equivalents(), defaultdict(lambda: defaultdict(int)), []
    for r in results:
        kind = r["outcome"]
        if kind in ("survived", "no test"):
            kind = "explained" if (r["path"], r["diff"]) in known else kind
        if kind in ("survived", "no test"):
            open_.append(r)
        counts[folder(r["path"])][kind] += 1
    kinds = ("killed", "hung", "explained", "survived", "no test")
    print(f"| folder | faults | {' | '.join(kinds)} |\n| --- {'| --- ' * (len(kinds) + 1)}|")
    for name, row in sorted(counts.items()):
        print(f"| {name} | {sum(row.values())} | {' | '.join(str(row[k]) for k in kinds)} |")
    print(f"| all | {len(results)} | {' | '.join(str(sum(c[k] for c in counts.values())) for k in kinds)} |")
    for r in open_:
        print(f"\n{r['outcome']}, {r.get('tests', 0)} tests: {r['path']}:{r['line']}\n{r['diff']}")
    return len(open_)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paths", nargs="*", default=[], help="files or folders in the package, all by default")
    parser.add_argument(
        "--results", type=Path, required=True, help="a .jsonl file; the copy of the tree stands beside it"
    )
    parser.add_argument("--budget", type=float, default=40, help="seconds of CPU time of tests for one fault")
    parser.add_argument("--test-files", nargs="*", help="run these alone, not all of tests/ and the package's examples")
    parser.add_argument("--part", default="1/1", help="2/4: every fourth fault from the second on; results concatenate")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    tree = args.results.resolve().with_suffix(".tree")
    known = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []

    def note(**record: object) -> None:
        known.append(record)
        with args.results.open("a") as file:
            file.write(json.dumps(record) + "\n")

    if not args.report:
        pytest.main(["--version"])  # imports pytest's plugins, once for all children
        snapshot(tree)
        files = args.test_files or sorted(str(p.relative_to(tree)) for p in (tree / "tests").rglob("test_*.py"))
        for file in [*files, PACKAGE]:
            if all(r.get("file") != file for r in known):
                answer = in_child(tree, [file], None, 1200)
                assert answer, f"{file} does not end"
                print(f"{file}: {len(answer['tests'])} tests, failed as they are: {answer['failed']}", flush=True)
                note(file=file, tests={n: t for n, t in answer["tests"].items() if n not in answer["failed"]})
        tests = {name: entry for r in known if "file" in r for name, entry in r["tests"].items()}
        done = {r["key"] for r in known if "key" in r}
        part, parts = map(int, args.part.split("/"))
        for fault in sampled(tree, args.paths, args.faults, args.seed)[part - 1 :: parts]:
            if fault.key not in done:
                start, (old, _) = time.time(), fault.source(tree)
                at = {"path": fault.path, "line": old[: fault.start].count(b"\n") + 1, "diff": fault.diff(tree)}
                result = outcome(fault, tree, tests, args.budget)
                note(key=fault.key, **at, **result, seconds=round(time.time() - start, 1))
                print(f"{result['outcome']}: {at['path']}:{at['line']}\n{at['diff']}", flush=True)
    return int(report([r for r in known if "key" in r]) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
