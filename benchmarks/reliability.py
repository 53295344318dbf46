"""Every reliability test and a soak, counted: faults injected, inputs and sequences tried, violations, per version.

python benchmarks/reliability.py                        a soak of 2000 steps and the default tests
python benchmarks/reliability.py --long --steps 10500   every fault point of every family
python benchmarks/reliability.py --python python3.10 python3.13
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
SUITES = {
    "writes of a resize that fail, one by one": ["tests/handlers/test_every_family.py", "-k", "failing_write"],
    "memory that runs out inside a resize": ["tests/promises/test_faults.py"],
    "saves killed or failing at a file operation": ["tests/hub/test_save.py", "-k", "failing or ends_at"],
    "requests of a Hub that fail": ["tests/hub/test_push.py", "-k", "breaks"],
    "damaged, foreign and malicious checkpoints": ["tests/promises/test_broken_checkpoints.py"],
    "absurd sizes, options, configurations, paths": ["tests/promises/test_hostile.py", "tests/core/test_request.py"],
    "threads and processes in each other's way": [
        "tests/promises/test_concurrency.py",
        "tests/test_multi_size.py",
        "-k",
        "thread or process or install_and",
    ],
}
"""What is tried, and the tests that try it. A test that injects more than one fault records how many."""
VERSIONS = """import sys, timm, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "timm", timm.__version__)"""


def tested(python: str, arguments: list[str], long: bool) -> tuple[int, int, int]:
    """Run tests; returns how many ran, what they tried by their own count, and how many failed."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [python, "-m", "pytest", *arguments, "-p", "no:cacheprovider", "--junitxml", report.name]
        command += ["-m", "slow or not slow"] if long else []
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        cases = [c for c in ElementTree.parse(report.name).iter("testcase") if c.find("skipped") is None]
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    for case in failed:
        print(f"violation: {case.get('classname')}.{case.get('name')}", flush=True)
    return len(cases), sum(int(next((p.get("value") for p in c.iter("property")), 1)) for c in cases), len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="every fault point of every family: hours, not minutes")
    parser.add_argument("--steps", type=int, default=2000, help="of the soak")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters with the test extra")
    args = parser.parse_args()
    total = 0
    for python in args.python:
        versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.strip()
        print(f"\n{versions}\n\n| what | tests | tried | violations |\n| --- | --- | --- | --- |", flush=True)
        for what, arguments in SUITES.items():
            tests, tried, failed = tested(python, arguments, args.long)
            total += failed if tests else 1
            print(f"| {what} | {tests} | {tried} | {failed if tests else 'did not run'} |", flush=True)
        soak = subprocess.run(
            [python, "benchmarks/soak.py", "--steps", str(args.steps)], cwd=ROOT, capture_output=True, text=True
        )
        print(f"\nSoak: {soak.stdout.strip() or soak.stderr.strip()}", flush=True)
        total += soak.returncode
    print(f"\n{total} violations on {len(args.python)} version(s)")
    return int(total > 0)


if __name__ == "__main__":
    raise SystemExit(main())
