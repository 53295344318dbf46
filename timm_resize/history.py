"""What was done to a model's weights, from checkpoint to checkpoint: kept on the model and in the files it is saved to.

A history is a tuple of JSON objects in the order of events:

- {"checkpoint": where from, "img_size": [H, W]}: weights were read;
- {"resized": [[H, W], [H, W]], "methods": {tensor: method}}: block numbers in the tensor's name are "*". A further
  resize of tensors that nobody changed starts from their originals, and then replaces this event;
- {"trained": [tensor, …]}: resampled tensors were changed by something else than a resize.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from timm.models import _builder, _hub
from torch import nn

from timm_resize.geometry import Size
from timm_resize.locate import current_size
from timm_resize.plan import ResizePlan
from timm_resize.resample import Resample

Events = tuple[dict[str, Any], ...]

HISTORY = "_resize_history"
"""Attribute of a resized model that holds its history. Plain values, so that it unpickles anywhere."""

CHAIN = "_resize_chain"
"""Attribute of a resized model: per resampled tensor the original, where it lived, and what was written.

Plain dicts, tuples and tensors, so that a resized model unpickles where this package is not installed.
"""

METADATA = "timm_resize"
"""Key in the metadata of a safetensors file, for JSON: versions, architecture, img_size [H, W], history."""


def extended(events: Sequence[dict[str, Any]], plan: ResizePlan, changed: Sequence[str] = ()) -> Events:
    """Return a history with a resize added; `changed` names resampled tensors that are no longer as they were left."""
    out = list(events)
    start = list(plan.old_size or plan.new_size)
    methods: dict[str, str] = {}
    if changed:
        out.append({"trained": sorted({_kind(key) for key in changed})})
    elif out and "resized" in out[-1]:
        last = out.pop()
        start, methods = last["resized"][0], dict(last["methods"])
    methods.update({_kind(c.key): c.action for c in plan.tensors if isinstance(c.how, Resample)})
    if start != list(plan.new_size) or (plan.old_size == plan.new_size and plan.tensors):
        out.append({"resized": [start, list(plan.new_size)], "methods": methods})
    return tuple(out)


def _kind(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key)


def metadata(root: nn.Module, changed: list[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file of the model."""
    from timm_resize import __version__

    config: dict[str, Any] = getattr(root, "pretrained_cfg", None) or {}
    size = current_size(root)
    record = {
        "versions": {"timm_resize": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
        "architecture": config.get("architecture"),
        "img_size": None if size is None else list(size),
        "history": history(root, changed),
    }
    return {"format": "pt", METADATA: json.dumps(record)}


def history(root: nn.Module, changed: list[str]) -> list[dict[str, Any]]:
    """Return the whole history of a model up to now; for one of a stock build, the checkpoint that its config names."""
    config: dict[str, Any] = getattr(root, "pretrained_cfg", None) or {}
    events = list(getattr(root, HISTORY, ()))
    if not any("checkpoint" in event for event in events):
        size = (config.get("input_size") or (None,))[1:]
        events.insert(0, {"checkpoint": checkpoint_name(config), "img_size": list(size)})
    return [*events, {"trained": sorted({_kind(key) for key in changed})}] if changed else events


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what this package recorded in a safetensors file, {} where it recorded nothing that can be read."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (OSError, ValueError, SafetensorError):
        return {}
    return record if isinstance(record, dict) else {}


def recorded_size(path: str | Path) -> Size | None:
    """Return the image size (H, W) recorded in a safetensors file, None where there is none."""
    size = read_metadata(path).get("img_size")
    if isinstance(size, list) and len(size) == 2 and all(type(s) is int and s > 0 for s in size):
        return size[0], size[1]
    return None


def adopted(path: str | Path | None, name: str) -> Events:
    """Return the history that a file brings along, ending with its own being read as `name`; () when it has none."""
    record = read_metadata(path) if path else {}
    events = record.get("history")
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        return ()
    return (*events, {"checkpoint": name, "img_size": record.get("img_size")})


def checkpoint_name(config: dict[str, Any]) -> str | None:
    """Return what to call the checkpoint of a `pretrained_cfg`; of a file its name only, not where it lies."""
    kind, place = _builder._resolve_pretrained_source(config) if config else ("", None)
    place = place[0] if isinstance(place, tuple) else place
    if kind == "state_dict" or not place:
        return None
    return Path(place).name if kind in ("file", "local-dir") else str(place)


def checkpoint_file(config: dict[str, Any]) -> str | None:
    """Return the file on this machine that a `pretrained_cfg` is loaded from, None when it cannot be told."""
    kind, place = _builder._resolve_pretrained_source(config) if config else ("", None)
    if not place or kind not in ("file", "local-dir", "hf-hub"):
        return None
    if kind != "hf-hub":
        return str(Path(place, "model.safetensors") if kind == "local-dir" else place)
    name, file = place if isinstance(place, tuple) else (place, "model.safetensors")
    repo, revision = _hub.hf_split(name)
    try:
        found = try_to_load_from_cache(repo, file, revision=revision)
    except ValueError:  # no valid repository id
        return None
    return found if isinstance(found, str) else None
