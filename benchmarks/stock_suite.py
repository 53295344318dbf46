"""timm's own tests, without and with the plugin installed: the outcomes must be the same, test by test.

Takes the folder of an unpacked timm source distribution, which holds its tests, or downloads it with pip.

    python benchmarks/stock_suite.py                                # factory, hub, inputs, layers, optimizers
    python benchmarks/stock_suite.py --models resnet18 levit_128s   # and the model tests of these
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

FILES = (
    "test_factory.py",
    "test_hub.py",
    "test_model_input.py",
    "test_input_conv.py",
    "test_checkpoint_loading.py",
    "test_checkpoint_saver.py",
    "test_layers.py",
    "test_layers_drop.py",
    "test_layers_pool.py",
    "test_layers_pos_embed.py",
    "test_data.py",
    "test_scheduled_sampler.py",
)
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)", re.MULTILINE)
PLUGIN = """
import timm_resize
timm_resize.install()
"""
"""A pytest plugin that installs ours before any test module is imported."""


def fetch(folder: Path) -> Path:
    """Download and unpack timm's source distribution of the installed version."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-binary",
            ":all:",
            "--no-deps",
            f"timm=={timm.__version__}",
            "--dest",
            str(folder),
        ],
        check=True,
    )
    archive = next(folder.glob("timm-*.tar.gz"))
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def outcomes(source: Path, plugin: bool, models: list[str], scratch: Path) -> dict[str, str]:
    """Run the tests in a process of its own; return the outcome of each."""
    scratch.mkdir(exist_ok=True)
    (scratch / "with_timm_resize.py").write_text(PLUGIN)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(scratch), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }
    files = [str(source / "tests" / name) for name in FILES if (source / "tests" / name).exists()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-c",
        os.devnull,
        "--rootdir",
        str(source),
        *(["-p", "with_timm_resize"] if plugin else []),
    ]
    found: dict[str, str] = {}
    runs = [files]
    if models:
        runs.append([str(source / "tests" / "test_models.py"), "-k", " or ".join(models)])
    for what in runs:
        run = subprocess.run([*command, *what], env=env, cwd=scratch, capture_output=True, text=True)
        here = dict(OUTCOME.findall(run.stdout))
        if not here:
            raise SystemExit(f"no test ran:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        found.update(here)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="unpacked timm source distribution; downloaded when left out")
    parser.add_argument(
        "--models", nargs="*", default=[], help="run the tests of test_models.py with these in their name"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = args.source.resolve() if args.source else fetch(Path(folder))
        without = outcomes(source, False, args.models, Path(folder, "without"))
        installed = outcomes(source, True, args.models, Path(folder, "with"))
    names = sorted({*without, *installed})
    different = [n for n in names if without.get(n) != installed.get(n)]
    for kind in sorted({*without.values(), *installed.values()}):
        print(
            f"{kind:8} {sum(v == kind for v in without.values()):6} without, "
            f"{sum(v == kind for v in installed.values()):6} with the plugin"
        )
    for name in different:
        print(f"{name}: {without.get(name)} without, {installed.get(name)} with")
    print(f"{len(names)} tests, {len(different)} differ")
    return int(bool(different))


if __name__ == "__main__":
    raise SystemExit(main())
