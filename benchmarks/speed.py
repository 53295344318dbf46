"""How long loading, resizing and planning take and how much memory: ours beside stock timm, and the machine's limit.

Ours and stock take turns in the same process; times are medians with the range from the first to the third quartile, in
milliseconds. Peak memory is that of a process of its own. The limit is the time in which the machine moves the bytes
that the work must move at least: from the page cache into new memory for a file, into new memory for masks and tables.
Weights are random; the files lie in a temporary folder and stay in the page cache.

    python benchmarks/speed.py                                # all sections, minutes to half an hour
    python benchmarks/speed.py --sections resize masks --repeat 20
    python benchmarks/speed.py --quick                        # seconds, small models: does it still run
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import _hub
from torch import nn

import timm_resize

CREATE = {
    "vit_small_patch16_224": 384,
    "vit_base_patch16_224": 384,
    "vit_large_patch16_224": 384,
    "vit_huge_patch14_224": 392,
    "swin_base_patch4_window7_224": 384,
    "convnext_large": 384,
    "beit_large_patch16_224": 384,
    "levit_384": 384,
    "mixer_b16_224": 384,
}
"""Models created from a file, and the size other than their own."""
RESIZE = (
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "swin_base_patch4_window7_224",
    "swinv2_base_window8_256",
    "beit_base_patch16_224",
    "beit_large_patch16_224",
    "maxvit_tiny_tf_224",
    "maxvit_base_tf_224",
    "levit_384",
    "mixer_b16_224",
    "crossvit_base_240",
    "volo_d1_224",
    "hiera_base_224",
    "mvitv2_base",
    "cait_s24_224",
    "nest_base",
    "pit_b_224",
    "gcvit_base",
    "convit_base",
    "tnt_b_patch16_224",
    "samvit_base_patch16_224",
    "coat_lite_medium",
    "visformer_small",
    "efficientformer_l3",
    "tiny_vit_21m_224",
    "convnext_base",
    "resnet50",
)
QUICK = ("vit_tiny_patch16_224", "levit_128s", "swin_tiny_patch4_window7_224")
REFUSED = (TypeError, ValueError, AssertionError, RuntimeError, AttributeError)


@dataclass(frozen=True)
class Times:
    """Seconds of several runs."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def __str__(self) -> str:
        low, _, high = statistics.quantiles(self.runs, n=4) if len(self.runs) > 1 else self.runs * 3
        return f"{_ms(self.median)} ({_ms(low)}–{_ms(high)})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def alternate(repeat: int, *works: Callable[[], Any] | None, before: Callable[[], Any] = lambda: None) -> list[Any]:
    """Run the works in turn, `repeat` times after one that does not count; return each one's Times, None for None."""
    runs: list[list[float]] = [[] for _ in works]
    for turn in range(repeat + 1):
        for work, own in zip(works, runs, strict=True):
            if work is None:
                continue
            before()
            gc.collect()
            start = time.perf_counter()
            held = work()
            own.append(time.perf_counter() - start)
            del held
        if not turn and max((sum(own) for own in runs), default=0.0) < 60:
            for own in runs:
                own.clear()
    return [Times(tuple(own)) if own else None for own in runs]


def row(*cells: Any) -> None:
    print("| " + " | ".join("-" if c is None else str(c) for c in cells) + " |", flush=True)


def head(title: str, *columns: str) -> None:
    print(f"\n## {title}\n")
    row(*columns)
    row(*("---" for _ in columns))


def ratio(ours: Times | None, stock: Times | None) -> str | None:
    return None if ours is None or stock is None else f"{stock.median / ours.median:.3g}x"


# -- the machine ------------------------------------------------------------------------------


def bandwidth(folder: Path) -> dict[str, float]:
    """Measure bytes per second from the page cache into new memory, and into new memory: the best of five."""
    count = 256 * 2**20
    path = folder / "bandwidth.safetensors"
    save_file({"x": torch.randint(0, 255, (count,), dtype=torch.uint8)}, path)

    def read() -> Any:
        return load_file(path)["x"].clone()

    best = [min(t.runs) for t in alternate(5, read, lambda: torch.zeros(count, dtype=torch.uint8))]
    path.unlink()
    return {"file": count / best[0], "memory": count / best[1]}


def moved(model: nn.Module, plan: Any) -> int:
    """Return the bytes of the tensors that a plan makes, read once from the old and written once."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(tensors[c.key].nbytes for c in plan.tensors if c.key in tensors)


# -- sections ---------------------------------------------------------------------------------


def create(arguments: argparse.Namespace, speed: dict[str, float], folder: Path) -> None:
    """From a safetensors file, at the model's size and at another."""
    head(
        "Create from a local file",
        "model",
        "MB",
        "size",
        "ours, ms",
        "stock, ms",
        "ratio",
        "limit, ms",
        "extra peak memory / model: ours",
        "stock",
    )
    models = {"vit_tiny_patch16_224": 96} if arguments.quick else CREATE
    for name, other in models.items():
        if not any(fnmatch(name, pattern) for pattern in arguments.models):
            continue
        path = folder / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in timm.create_model(name).state_dict().items()}, path)
        size = path.stat().st_size
        for img_size in (None, other):
            ours, stock = (_creation(who, name, path, img_size) for who in ("ours", "stock"))
            times = alternate(arguments.repeat, ours, stock if _runs(stock) else None)
            peaks = [
                None if t is None else f"{_peak(who, name, path, img_size) / size:.2f}"
                for who, t in zip(("ours", "stock"), times, strict=True)
            ]
            row(name, f"{size / 1e6:.0f}", img_size or "own", *times, ratio(*times), _ms(size / speed["file"]), *peaks)
        path.unlink()


def _creation(who: str, name: str, path: Path, img_size: int | None) -> Callable[[], nn.Module]:
    make = {"ours": timm_resize.create_model, "stock": timm.create_model}[who]
    size = {} if img_size is None else {"img_size": img_size}
    return lambda: make(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **size)


def _runs(work: Callable[[], Any]) -> bool:
    try:
        work()
    except REFUSED:
        return False
    return True


def _peak(who: str, name: str, path: Path, img_size: int | None) -> int:
    """Return the bytes by which creating the model raised the peak of a fresh process."""
    job = json.dumps([who, name, str(path), img_size])
    out = subprocess.run([sys.executable, __file__, "--peak", job], capture_output=True, text=True, check=True)
    return int(out.stdout.split()[-1])


def peak(job: str) -> None:
    """Create one model in this process and print the rise of its peak memory, in bytes."""
    who, name, path, img_size = json.loads(job)
    timm_resize.create_model("test_vit", img_size=96)  # what a first call imports
    before = _peak_now()
    model = _creation(who, name, Path(path), img_size)()
    assert model is not None
    print(_peak_now() - before)


def _peak_now() -> int:
    """Return this process's peak memory in bytes; Linux's ru_maxrss starts with that of the parent process."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resize(arguments: argparse.Namespace, speed: dict[str, float], folder: Path) -> None:
    """`set_input_size` from the model's size to another, planning alone, and a size that it already has."""
    head(
        "Set the input size",
        "model",
        "from",
        "to",
        "plan, ms",
        "same size, µs",
        "ours, ms",
        "stock, ms",
        "ratio",
        "limit, ms",
    )
    for name in QUICK if arguments.quick else RESIZE:
        if not any(fnmatch(name, pattern) for pattern in arguments.models):
            continue
        model = timm.create_model(name).eval()
        old = timm_resize.plan_resize(model).new_size
        wanted = tuple(side * 12 // 7 for side in old)
        new = timm_resize.nearest_sizes(model, wanted)[0]
        models = [model, copy.deepcopy(model)]
        stock = (lambda m=models[1], s=new: m.set_input_size(s)) if hasattr(model, "set_input_size") else None

        def back(models: Any = models, size: Any = old) -> None:
            for one in models:
                timm_resize.resize_(one, size)

        plan, same = alternate(
            arguments.repeat,
            lambda m=model, s=new: timm_resize.plan_resize(m, s),
            lambda m=model, s=old: timm_resize.resize_(m, s),
        )
        times = alternate(arguments.repeat, lambda m=model, s=new: timm_resize.resize_(m, s), stock, before=back)
        timm_resize.resize_(model, new)
        limit = moved(model, timm_resize.plan_resize(model, old)) / speed["memory"]
        row(name, text(old), text(new), plan, f"{same.median * 1e6:.0f}", *times, ratio(*times), _ms(limit))


def text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}" if size[0] != size[1] else str(size[0])


def masks(arguments: argparse.Namespace, speed: dict[str, float], folder: Path) -> None:
    """A Swin of one shifted block in its first stage, at sizes where its attention mask is most of the work."""
    head(
        "Swin attention masks",
        "px",
        "windows",
        "MB of masks",
        "ours, ms",
        "stock, ms",
        "ratio",
        "ours, ms / MB",
        "limit, ms",
    )
    args = {"depths": (2, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 1, 1), "num_classes": 2}
    models = [timm.create_model("swin_tiny_patch4_window7_224", **args) for _ in range(2)]

    def back() -> None:
        for model in models:
            timm_resize.resize_(model, 224, window_size=7)

    for side in (448,) if arguments.quick else (1024, 1536, 2048, 3072, 4096):
        size = timm_resize.nearest_sizes(models[0], side)[0]
        times = alternate(
            arguments.repeat,
            lambda s=size: timm_resize.resize_(models[0], s, window_size=7),
            lambda s=size: models[1].set_input_size(s, window_size=7),
            before=back,
        )
        back()
        timm_resize.resize_(models[0], size, window_size=7)
        mask = models[0].layers[0].blocks[1].attn_mask
        back()
        per = times[0].median * 1e3 / (mask.nbytes / 1e6)
        row(
            text(size),
            mask.shape[0],
            f"{mask.nbytes / 1e6:.1f}",
            *times,
            ratio(*times),
            f"{per:.2f}",
            _ms(mask.nbytes / speed["memory"]),
        )


def save(arguments: argparse.Namespace, speed: dict[str, float], folder: Path) -> None:
    """Weights and config into a folder."""
    head("Save", "model", "MB", "ours, ms", "stock, ms", "ratio")
    for name in QUICK[:1] if arguments.quick else ("vit_base_patch16_224", "vit_large_patch16_224"):
        model = timm.create_model(name)
        size = sum(t.nbytes for t in model.state_dict().values())
        times = alternate(
            arguments.repeat,
            lambda m=model: timm_resize.save_pretrained(m, folder / "ours"),
            lambda m=model: _hub.save_for_hf(m, str(folder / "stock"), safe_serialization=True),
        )
        row(name, f"{size / 1e6:.0f}", *times, ratio(*times))


def convert(arguments: argparse.Namespace, speed: dict[str, float], folder: Path) -> None:
    """A state dict of one size for a model of another; stock's way is the model's checkpoint filter."""
    head("Convert a state dict", "model", "from", "to", "ours, ms", "stock, ms", "ratio")
    for name in QUICK[:1] if arguments.quick else ("vit_base_patch16_224", "beit_base_patch16_224", "levit_384"):
        source = timm.create_model(name).state_dict()
        model = timm_resize.create_model(name, img_size=384)
        module = sys.modules[type(model).__module__]
        stock = getattr(module, "checkpoint_filter_fn", None)
        work = (lambda f=stock, s=source, m=model: f(dict(s), m)) if stock and "levit" not in name else None
        times = alternate(arguments.repeat, lambda s=source, m=model: timm_resize.resize_state_dict(s, m), work)
        row(name, 224, 384, *times, ratio(*times))


def forward(arguments: argparse.Namespace, speed: dict[str, float], folder: Path) -> None:
    """One image through a resized model and through one that stock built at that size; then without the plugin."""
    head("Forward", "model", "size", "resized, ms", "stock's own, ms", "resized / own", "plugin in, ms", "in / out")
    for name in QUICK[:1] if arguments.quick else ("vit_small_patch16_224", "swin_tiny_patch4_window7_224"):
        size = 96 if arguments.quick else 384
        resized = timm.create_model(name).eval()
        timm_resize.resize_(resized, size)
        own = timm.create_model(name, **resized._model_args).eval()
        own.load_state_dict(resized.state_dict())
        x = torch.randn(1, 3, size, size)
        with torch.inference_mode():
            a, b = alternate(arguments.repeat * 3, lambda m=resized, x=x: m(x), lambda m=own, x=x: m(x))
            with timm_resize.install():
                (c,) = alternate(arguments.repeat * 3, lambda m=own, x=x: m(x))
        row(name, size, a, b, f"{a.median / b.median:.3f}", c, f"{c.median / b.median:.3f}")


def imports(arguments: argparse.Namespace, speed: dict[str, float], folder: Path) -> None:
    """Fresh processes: importing timm, then ours as well, then `install()` too."""
    head("Import", "statement", "ms in a fresh process")
    codes = ("import timm", "import timm, timm_resize", "import timm, timm_resize; timm_resize.install()")

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    repeat = 1 if arguments.quick else max(arguments.repeat, 5)
    for code, times in zip(codes, alternate(repeat, *(lambda c=c: run(c) for c in codes)), strict=True):
        row(f"`{code}`", times)


def files(arguments: argparse.Namespace, speed: dict[str, float], folder: Path) -> None:
    """Memory of its own, without mapped files, that `timm-resize convert` takes beyond what `timm-resize plan` does."""
    head("Convert a file", "model", "MB", "size", "memory beyond planning, MB", "resized tensors, MB")
    for name in QUICK[:1] if arguments.quick else ("vit_large_patch16_224", "swin_base_patch4_window7_224"):
        model, path = timm.create_model(name), folder / f"{name}.safetensors"
        save_file(model.state_dict(), path)
        plan = timm_resize.plan_resize(model, 384)
        resized = sum(4 * math.prod(c.new) for c in plan.tensors if c.kind == "parameter")
        output = ("--img-size", "384", "--output", folder / name)
        extra = own_memory("convert", path, "--model", name, *output) - own_memory("plan", name, *output[:2])
        row(name, f"{path.stat().st_size / 1e6:.0f}", "384", f"{extra / 1e6:.0f}", f"{resized / 1e6:.1f}")


def own_memory(*command: Any) -> int:
    """Return the peak of the anonymous memory of a command line, in bytes, looked at every two milliseconds."""
    process = subprocess.Popen([sys.executable, "-m", "timm_resize", *map(str, command)], stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            most = max(most, int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024)
        time.sleep(0.002)
    assert process.returncode == 0
    return most


SECTIONS: dict[str, Callable[[argparse.Namespace, dict[str, float], Path], None]] = {
    "create": create,
    "resize": resize,
    "masks": masks,
    "save": save,
    "convert": convert,
    "forward": forward,
    "imports": imports,
    "files": files,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--models", nargs="+", default=["*"], help="patterns, for the sections create and resize")
    parser.add_argument("--repeat", type=int, default=5, help="measured runs of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small models, one run")
    parser.add_argument("--folder", type=Path, help="where the files go; the default is a temporary folder")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if arguments.peak:
        peak(arguments.peak)
        return
    arguments.repeat = 1 if arguments.quick else arguments.repeat
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        speed = bandwidth(Path(folder))
        load = " ".join(f"{value:.2f}" for value in os.getloadavg())
        print(f"timm {timm.__version__}, torch {torch.__version__}, {arguments.threads} threads, load average {load}")
        print(f"page cache to new memory {speed['file'] / 1e9:.1f} GB/s, new memory {speed['memory'] / 1e9:.1f} GB/s")
        for name in arguments.sections:
            SECTIONS[name](arguments, speed, Path(folder))
        print(f"\nload average at the end {' '.join(f'{value:.2f}' for value in os.getloadavg())}")


if __name__ == "__main__":
    main()
