"""Memory that a plan needs, known before any of it is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

from timm_resize.core.plan import Change, Rebuild, ResizePlan, submodule
from timm_resize.errors import InvalidSizeError
from timm_resize.geometry import Size
from timm_resize.resample import Resample

LARGE = 2048
"""Pixels of a side beyond which the memory is worth a look."""


def needed(root: nn.Module, changes: Iterable[Change]) -> dict[torch.device, int]:
    """Return the bytes of the new tensors of a plan, per device; equal masks and indices count once.

    A resampled parameter counts twice: what was written is kept, to tell later whether training changed it.
    """
    out: dict[torch.device, int] = {}
    seen = set()
    for change in changes:
        if change.kind == "attribute" or not change.new:
            continue
        like = _like(root, change)
        key = (change.how.fn, change.how.args, like.device) if isinstance(change.how, Rebuild) else change.key
        if key not in seen:
            seen.add(key)
            count = math.prod(change.new) * (2 if isinstance(change.how, Resample) else 1)
            out[like.device] = out.get(like.device, 0) + count * like.element_size()
    return out


def _like(root: nn.Module, change: Change) -> Tensor:
    """Return a tensor with the type and the device that a new one is going to have."""
    module = submodule(root, change.path)
    found: Tensor | None = None
    if module is not None:
        found = module._parameters.get(change.name)
        found = found if found is not None else module._buffers.get(change.name)
    return found if found is not None else next(root.parameters(), torch.empty(0))


def check_memory(root: nn.Module, plan: ResizePlan, on: torch.device | None = None) -> None:
    """Raise InvalidSizeError where a plan needs more memory than is free, which the system may answer by killing.

    `on` is the device that a model which is now on the meta device is going to be built on.
    """
    if max(plan.new_size) <= LARGE:
        return
    for device, size in needed(root, plan).items():
        device = on if on is not None and device.type == "meta" else device
        free = _free(device)
        if free is not None and size > free:
            raise InvalidSizeError(
                f"{plan.model}: img_size={plan.new_size} takes {size / 1e9:.1f} GB for its tensors, "
                f"{free / 1e9:.1f} GB are free on {device}. Use a smaller size.",
                model=plan.model,
                argument="img_size",
                value=plan.new_size,
            )


def memory_note(root: nn.Module, changes: Iterable[Change], img_size: Size) -> list[str]:
    """Return a remark on the memory that a plan for a large image takes; none for others."""
    if max(img_size) <= LARGE:
        return []
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
            return int(lines["MemAvailable"].split()[0]) * 1024
    with suppress(ValueError, OSError, AttributeError):  # other Unixes; all there is, as nobody tells what is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
