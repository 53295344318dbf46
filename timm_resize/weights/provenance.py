"""Where weights come from and what was done to them, as files record it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from timm.models import _builder, _hub
from torch import nn

from timm_resize.core.find import current_size
from timm_resize.core.history import CHAIN, HISTORY, Events, extended, generic_name
from timm_resize.core.plan import ResizePlan
from timm_resize.geometry import Size
from timm_resize.version import __version__


def adopt_(root: nn.Module, path: str | None = None, plan: ResizePlan | None = None) -> None:
    """Start the history of a model that was just loaded: from a file, by default that of its `pretrained_cfg`.

    What its tensors were before, random values or others, is forgotten. `plan` is what the file's tensors went
    through.
    """
    config = getattr(root, "pretrained_cfg", None) or {}
    name = os.path.basename(path) if path else checkpoint_name(config) or "a state dict"
    size = plan.old_size if plan else current_size(root)
    read: Events = ({"checkpoint": name, "img_size": list(size or ())},)
    events = adopted(path or checkpoint_file(config), name) or read
    if hasattr(root, CHAIN):
        setattr(root, CHAIN, {})
    setattr(root, HISTORY, extended(events, plan) if plan else events)


METADATA = "timm_resize"
"""Key in the metadata of a safetensors file, for JSON: versions, architecture, img_size [H, W], history."""

MOST = 1000
"""Events of a file's history; a longer one was not written by this package."""


def metadata(root: nn.Module, changed: list[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file of the model."""
    config = getattr(root, "pretrained_cfg", None) or {}
    size = current_size(root)
    record = {
        "versions": {"timm_resize": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
        "architecture": config.get("architecture"),
        "img_size": None if size is None else list(size),
        "history": history(root, changed),
    }
    return {"format": "pt", METADATA: json.dumps(record)}


def history(root: nn.Module, changed: list[str]) -> list[dict[str, Any]]:
    """Return the whole history of a model up to now; it begins with None where this package loaded no weights."""
    events = list(getattr(root, HISTORY, ()))
    if not any("checkpoint" in event for event in events):
        events.insert(0, {"checkpoint": None, "img_size": None})
    return [*events, {"trained": sorted({generic_name(key) for key in changed})}] if changed else events


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what this package recorded in a safetensors file, {} where it recorded nothing that can be read.

    Anybody may have written it: callers check what they take.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (OSError, ValueError, RecursionError, SafetensorError):
        return {}
    return record if isinstance(record, dict) else {}


def recorded_size(path: str | Path) -> Size | None:
    """Return the image size (H, W) recorded in a safetensors file, None where there is none."""
    size = read_metadata(path).get("img_size")
    return (size[0], size[1]) if size and _is_size(size) else None


def adopted(path: str | Path | None, name: str) -> Events:
    """Return the history that a file brings along, ending with its own being read as `name`; () when it has none."""
    record = read_metadata(path) if path else {}
    events = record.get("history")
    size = record.get("img_size")
    if not isinstance(events, list) or len(events) > MOST or not all(map(_is_event, events)) or not _is_size(size):
        return ()
    return (*events, {"checkpoint": name, "img_size": size})


def _is_event(event: object) -> bool:
    """Whether an entry of a file's history is one that this package writes."""
    if not isinstance(event, dict):
        return False
    if event.keys() == {"checkpoint", "img_size"}:
        return isinstance(event["checkpoint"], (str, type(None))) and _is_size(event["img_size"])
    if event.keys() == {"resized", "methods"}:
        sizes, methods = event["resized"], event["methods"]
        pair = isinstance(sizes, list) and len(sizes) == 2 and all(size and _is_size(size) for size in sizes)
        return pair and isinstance(methods, dict) and all(isinstance(v, str) for v in methods.values())
    names = event.get("trained")
    return event.keys() == {"trained"} and isinstance(names, list) and all(isinstance(n, str) for n in names)


def _is_size(size: object) -> bool:
    """Whether a recorded size is one, or stands for none."""
    return not size or (isinstance(size, list) and len(size) == 2 and all(type(s) is int and s > 0 for s in size))


def checkpoint_name(config: Mapping[str, object]) -> str | None:
    """Return what to call the checkpoint of a `pretrained_cfg`; of a file its name only, not where it lies."""
    kind, place = _builder._resolve_pretrained_source(config) if config else ("", None)
    place = place[0] if isinstance(place, tuple) else place
    if kind == "state_dict" or not place:
        return None
    return Path(place).name if kind in ("file", "local-dir") else str(place)


def checkpoint_file(config: Mapping[str, object]) -> str | None:
    """Return the file on this machine that a `pretrained_cfg` is loaded from, None when it cannot be told."""
    kind, place = _builder._resolve_pretrained_source(config) if config else ("", None)
    if place and kind in ("file", "local-dir"):
        return str(Path(place, "model.safetensors") if kind == "local-dir" else place)
    on_hub = hub_file(config)
    if on_hub is None:
        return None
    repo, file, revision = on_hub
    try:
        found = try_to_load_from_cache(repo, file, revision=revision)
    except ValueError:  # no valid repository id
        return None
    return found if isinstance(found, str) else None


def hub_file(config: Mapping[str, object]) -> tuple[str, str, str | None] | None:
    """Return the repository, file and revision on the Hub that a `pretrained_cfg` is loaded from, if it is."""
    kind, place = _builder._resolve_pretrained_source(config) if config else ("", None)
    if kind != "hf-hub" or not place:
        return None
    name, file = place if isinstance(place, tuple) else (place, "model.safetensors")
    repo, revision = _hub.hf_split(name)
    return repo, file, revision
