"""Memory that a plan needs, known before any of it is allocated: the shapes are in the plan."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from timm_resize.core.plan import Change, Rebuild, ResizePlan, submodule, tensor_of
from timm_resize.errors import InvalidSizeError
from timm_resize.resample import Resample

SMALL = 1 << 26
"""Bytes below which nobody asks how many are free."""


def needed(root: nn.Module, changes: Iterable[Change], *, in_place: bool = True) -> dict[torch.device, int]:
    """Return the bytes that a plan takes at its peak beside the model as it is, per device.

    All new tensors exist before the first is written, buffers first, and what each is computed through while it is: an
    index or a mask through one of its size. A resize in place keeps the original of a resampled tensor, and what it
    wrote, to tell later whether training changed it. Equal masks and indices that no state dict holds are one.

    Source: `python benchmarks/memory.py`, which measures the peak of a process.
    """
    kept: defaultdict[torch.device, int] = defaultdict(int)
    peak: defaultdict[torch.device, int] = defaultdict(int)
    seen: set[object] = set()

    def add(device: torch.device, stays: int, work: int) -> None:
        kept[device] += stays
        peak[device] = max(peak[device], kept[device] + work)

    for change in sorted(changes, key=lambda c: isinstance(c.how, Resample)):
        if change.kind == "attribute" or not change.new:
            continue
        like, count = _like(root, change), math.prod(change.new)
        on, size = like.device, like.element_size()
        if isinstance(change.how, Resample):
            for axis in {*change.how.every_axis} - seen:
                seen.add(axis)
                add(torch.device("cpu"), 8 * axis.old * axis.new, 24 * axis.old * axis.new)
            add(on, size * (2 * count + math.prod(change.old) if in_place else count), change.how.workspace(change.old))
            continue
        key = (change.how.fn, change.how.args, on, like.dtype) if isinstance(change.how, Rebuild) else change.key
        if key not in seen or not _is_transient(root, change):
            seen.add(key)
            add(on, size * count, size * count)
    return dict(peak)


def _is_transient(root: nn.Module, change: Change) -> bool:
    module = submodule(root, change.path)
    return module is not None and change.name in module._non_persistent_buffers_set


def _like(root: nn.Module, change: Change) -> Tensor:
    """Return a tensor with the type and the device that a new one is going to have."""
    module = submodule(root, change.path)
    found = tensor_of(module, change) if module is not None else None
    return found if found is not None else next(root.parameters(), torch.empty(0))


def check_memory(root: nn.Module, plan: ResizePlan, on: torch.device | None = None, *, in_place: bool = True) -> None:
    """Raise InvalidSizeError where a plan needs more memory than is free, which the system may answer by killing.

    `on` is the device that a model which is now on the meta device is going to be built on, `in_place` as for `needed`.
    """
    sizes = Counter[torch.device]()
    for device, size in needed(root, plan, in_place=in_place).items():
        sizes[on if on is not None and device.type == "meta" else device] += size
    require(plan, sizes)


def require(plan: ResizePlan, sizes: Mapping[torch.device, int]) -> None:
    """Raise InvalidSizeError where fewer bytes than a plan's tensors take are free on a device."""
    for device, size in sizes.items():
        free = _free(device) if size > SMALL else None
        if free is not None and size > free:
            raise InvalidSizeError(
                f"{plan.model}: img_size={plan.new_size} takes {size / 1e9:.1f} GB for its tensors, "
                f"{free / 1e9:.1f} GB are free on {device}. Use a smaller size.",
                model=plan.model,
                argument="img_size",
                value=plan.new_size,
            )


def memory_note(root: nn.Module, changes: Iterable[Change]) -> list[str]:
    """Return a remark on the memory that a plan takes, where that is more than 1 GB."""
    size = sum(needed(root, changes).values())
    return [f"its new tensors take {size / 1e9:.1f} GB"] if size > 1e9 else []


def _free(device: torch.device) -> int | None:
    """Return the free bytes of a device, None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    with suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
        if "MemAvailable" in lines:
            available = int(lines["MemAvailable"].split()[0]) * 1024
            return min(available, _left_to_group(available))
    with suppress(ValueError, OSError, AttributeError):  # other Unixes; all there is, as nobody tells what is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _left_to_group(available: int, folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that a container's limit leaves, `available` where there is none (control groups 2)."""
    with suppress(OSError, ValueError, KeyError):
        used = int((folder / "memory.current").read_text())
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
        return int((folder / "memory.max").read_text()) - used + int(cached)  # "max" is no number: no limit
    return available
