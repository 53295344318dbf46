"""The model card of a resized model: how to load it, where its weights come from, and what was done to them."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import timm
import torch
from torch import nn

from timm_resize.core.apply import apply_plan
from timm_resize.core.copies import planning_copy
from timm_resize.core.find import current_size, find_model
from timm_resize.core.history import touched
from timm_resize.core.plan import ResizePlan
from timm_resize.core.planner import plan_request
from timm_resize.core.request import make_request
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, parse_size, text
from timm_resize.version import __version__
from timm_resize.weights.provenance import checkpoint_name, history

UNKNOWN = "random initialisation, or weights that were loaded by something else"
_SIGNATURE = "<!-- timm_resize card "


def model_card(model: nn.Module, name: str, *, source: str, misfit: str | None = None) -> str:
    """Return a model card (Markdown with the Hub's metadata) for a model at its present size.

    Args:
        model: A timm model, or something that holds exactly one.
        name: Title of the card.
        source: What `create_model` is given to load it: "hf-hub:me/model" or "local-dir:folder".
        misfit: Why stock timm cannot use it, as `hub.stock_misfit` says; None when it can.
    """
    root = find_model(model)
    config: dict[str, Any] = getattr(root, "pretrained_cfg", None) or {}
    size = current_size(root)
    plan = since_source(root)
    front = ["library_name: timm", "pipeline_tag: image-classification"]
    front += ["tags:", "- image-classification", "- timm", "- timm_resize"]
    if config.get("license"):
        front.append(f"license: {config['license']}")
    loaded = last_checkpoint(root)
    if loaded and loaded == checkpoint_name(config) and str(config.get("hf_hub_id", "")).count("/") == 1:
        front.append(f"base_model: {config['hf_hub_id']}")
    architecture = ".".join(filter(None, (config.get("architecture"), loaded and config.get("tag"))))
    at = f" at {text(size)} pixels (height x width)" if size else ""
    lines = [
        "---",
        *front,
        "---",
        f"# {name}",
        "",
        f"`{architecture}`{at}.",
        "",
        "## Load it",
        "",
        "```python",
        *_code(source, size, misfit),
        "```",
        "",
    ]
    if misfit:
        lines += [f"Stock timm cannot build this size ({misfit}), so it takes the plugin.", ""]
    lines += ["## Where the weights come from", "", *_provenance(root, plan), ""]
    versions = f"timm_resize {__version__}, timm {timm.__version__}, torch {torch.__version__.split('+')[0]}"
    return signed("\n".join([*lines, f"Made with {versions}.", ""]))


def signed(text_: str) -> str:
    """Return a card with a last line that tells whether somebody has edited it."""
    return f"{text_}\n{_SIGNATURE}{hashlib.sha256(text_.encode()).hexdigest()[:16]} -->\n"


def is_ours(text_: str) -> bool:
    """Whether a card is as `model_card` made it, so that a later one may replace it."""
    body, mark, _ = text_.rpartition(f"\n{_SIGNATURE}")
    return bool(mark) and signed(body) == text_


def _code(source: str, size: Size | None, misfit: str | None) -> list[str]:
    if misfit is None:
        return ["import timm", "", f'model = timm.create_model("{source}", pretrained=True)']
    return ["import timm_resize", "", f'model = timm_resize.create_model("{source}", pretrained=True, img_size={size})']


def last_checkpoint(root: nn.Module) -> str | None:
    """Return the checkpoint that the weights were last loaded from, None where this package loaded none."""
    return next((event["checkpoint"] for event in reversed(history(root, [])) if "checkpoint" in event), None)


def _provenance(root: nn.Module, plan: ResizePlan | None) -> list[str]:
    at = _safe(last_checkpoint(root) or UNKNOWN)
    earlier = _earlier(root)
    if plan is None or plan.old_size is None or not plan:
        return [*earlier, f"Checkpoint: {at}, at its own size."]
    lines = [*earlier, f"Checkpoint: {at}, resized from {text(plan.old_size)} to {text(plan.new_size)}.", ""]
    if not plan.tensors:
        return [*lines, "No tensor depends on the size."]
    lines += ["| tensor | from | to | method |", "| --- | --- | --- | --- |"]
    for change in plan.tensors:
        old, new = ("x".join(map(str, shape)) if shape else "-" for shape in (change.old, change.new))
        lines.append(f"| `{change.key}` | {old} | {new} | {change.action} |")
    kept = "were trained or changed after the resize" if touched(root) else "still hold what the resize computed"
    return [*lines, "", f"The resampled tensors {kept}; all others are as loaded or trained."]


def _earlier(root: nn.Module) -> list[str]:
    """Return what was done before the checkpoint that the model was loaded from, a line an event."""
    events = history(root, [])
    starts = [i for i, event in enumerate(events) if "checkpoint" in event]
    lines = [f"- {event_line(event)}" for event in events[: starts[-1]]]
    return ["Before:", "", *lines, ""] if lines else []


def event_line(event: dict[str, Any]) -> str:
    """Return what an event of a history was, in a line."""
    if "checkpoint" in event:
        at = _safe(event["checkpoint"] or UNKNOWN)
        return f"checkpoint: {at}" + (f", {text(event['img_size'])}" if event.get("img_size") else "")
    if "resized" in event:
        old, new = event["resized"]
        methods = ", ".join(f"`{_safe(tensor)}` {_safe(method)}" for tensor, method in event["methods"].items())
        return f"resized from {text(old)} to {text(new)}" + (f": {methods}" if methods else "")
    return "trained or changed: " + ", ".join(f"`{_safe(tensor)}`" for tensor in event["trained"])


def _safe(words: str) -> str:
    """Return words of a file, which anybody may have written, without what Markdown reads as more than words."""
    return re.sub(r"[^\w .,:;*/@+-]", "?", words)[:200]


def since_source(root: nn.Module) -> ResizePlan | None:
    """Return the plan from the source checkpoint's size to the present one, None where it cannot be made."""
    size, config = current_size(root), getattr(root, "pretrained_cfg", None) or {}
    if size is None or not config.get("input_size"):
        return None
    copy = planning_copy(root)
    try:
        source = parse_size(tuple(config["input_size"][1:]), "input_size", type(root).__name__)
        apply_plan(copy, plan_request(copy, make_request(type(root).__name__, source)))
        return plan_request(copy, make_request(type(root).__name__, size))
    except (ResizeError, ValueError):
        return None
