"""What was done to a model's weights, from checkpoint to checkpoint: kept on the model and in the files it is saved to.

A history is a tuple of JSON objects in the order of events:

- {"checkpoint": where from, "img_size": [H, W]}: weights were read;
- {"resized": [[H, W], [H, W]], "methods": {tensor: method}}: block numbers in the tensor's name are "*". A further
  resize of tensors that nobody changed starts from their originals, and then replaces this event;
- {"trained": [tensor, …]}: resampled tensors were changed by something else than a resize.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from timm_resize.core.plan import ResizePlan
from timm_resize.resample import Resample


def untouched(applied: Tensor, param: Tensor) -> bool:
    """Whether a parameter still holds the bits that a resize wrote."""
    if applied.shape != param.shape or param.is_meta:
        return applied.shape == param.shape
    return not applied.is_meta and torch.equal(applied.to(param), param.detach())  # a model made real has other bits


def touched(root: nn.Module) -> list[str]:
    """Return the names of resampled tensors of a model that no longer hold the bits that the resize wrote."""
    links = Chain(getattr(root, CHAIN, {}))
    state = {**dict(root.named_parameters()), **dict(root.named_buffers())} if links else {}
    return [key for key, link in links.items() if key not in state or not untouched(link["applied"], state[key])]


Event = dict[str, Any]
"""As in the head of this file."""

Events = tuple[Event, ...]

HISTORY = "_resize_history"
"""Attribute of a resized model that holds its history. Plain values, so that it unpickles anywhere."""


class Link(TypedDict):
    """The original of a resampled tensor, the coordinates it lives at (`Resample.source`), and what was written."""

    origin: Tensor
    source: tuple[Any, ...]
    applied: Tensor


Chain = dict[str, Link]

CHAIN = "_resize_chain"
"""Attribute of a resized model: a `Chain`, by the names of its resampled tensors.

Plain dicts, tuples and tensors, so that a resized model unpickles where this package is not installed.
"""


def extended(events: Sequence[Event], plan: ResizePlan, changed: Sequence[str] = ()) -> Events:
    """Return a history with a resize added; `changed` names resampled tensors that are no longer as they were left."""
    out = list(events)
    start = list(plan.old_size or plan.new_size)
    methods: dict[str, str] = {}
    if changed:
        out.append({"trained": sorted({generic_name(key) for key in changed})})
    elif out and "resized" in out[-1]:
        last = out.pop()
        start, methods = last["resized"][0], dict(last["methods"])
    methods.update({generic_name(c.key): c.action for c in plan.tensors if isinstance(c.how, Resample)})
    if start != list(plan.new_size) or (plan.old_size == plan.new_size and plan.tensors):
        out.append({"resized": [start, list(plan.new_size)], "methods": methods})
    return tuple(out)


def resampled(root: nn.Module) -> dict[str, str]:
    """Return what a model's parameters went through since they were loaded: name → method.

    After a load that resized a state dict, whose originals nobody keeps, names that differ in block numbers alone are
    not told apart.
    """
    events = list(getattr(root, HISTORY, ()))
    last = max((i for i, event in enumerate(events) if "checkpoint" in event), default=-1)
    methods = {k: v for event in events[last + 1 :] for k, v in event.get("methods", {}).items()}
    names = list(getattr(root, CHAIN, {})) or [name for name, _ in root.named_parameters()]
    return {name: methods[generic_name(name)] for name in names if generic_name(name) in methods}


def generic_name(key: str) -> str:
    """Return a tensor's name with block numbers as '*'."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
