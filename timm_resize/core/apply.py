"""Apply a plan to a model and to what follows it: compute everything, then write all or nothing."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import replace
from functools import partial

from timm.models import FeatureInfo
from torch import nn

from timm_resize.core.find import SIZE_TRAITS, current_size, model_handler
from timm_resize.core.followers import (
    Ema,
    Optimizers,
    ema_writes,
    gradient_writes,
    optimizer_writes,
    several,
    state_bytes,
)
from timm_resize.core.memory import require
from timm_resize.core.plan import ResizePlan
from timm_resize.core.planner import plan_to
from timm_resize.core.request import ResizeOptions
from timm_resize.core.transaction import Transaction, Writes, resizing, write_all
from timm_resize.core.values import is_hook, model_writes
from timm_resize.errors import ResizeError
from timm_resize.resample import Resample

_logger = logging.getLogger("timm_resize")


def apply_plan(
    root: nn.Module,
    plan: ResizePlan,
    *,
    optimizer: Optimizers | None = None,
    ema: Ema | None = None,
    options: ResizeOptions | None = None,
    outer: nn.Module | None = None,
    grad: str = "clear",
) -> list[str]:
    """Compute every new value of `plan`, then write them all, for the model and what follows it.

    `outer` is a wrapper of `root` that may carry a copy of its traits (timm's feature wrappers do). Returns remarks
    on what followed the model: state that had to start afresh.
    """
    with resizing():
        maps: dict[nn.Parameter, Resample] = {}
        remarks: list[str] = []
        names = {} if optimizer is None else {id(p): name for name, p in root.named_parameters()}
        writes = model_writes(root, plan, maps)
        if outer is not None and outer is not root:
            writes += _outer_writes(outer, plan)
        for average in several(ema):
            writes += ema_writes(root, average, plan, options or {})
        for one in several(optimizer):
            require(plan, state_bytes(one, maps))
            more, fresh = optimizer_writes(one, maps, names)
            writes += more
            remarks += fresh
        if grad == "resample":
            writes += gradient_writes(maps)
        write_all(writes)
    if plan.tensors and not any(p.is_meta for p in root.parameters()):
        _logger.info("%s", plan)
    for text in plan.warnings:
        warnings.warn(f"{plan.model}: {text}", stacklevel=3)
    return remarks


def guard_(root: nn.Module) -> None:
    """Give a model the checks of its family for the size it is at; nothing else changes."""
    plan = planned_checks(root)
    if plan:
        apply_plan(root, plan)


def planned_checks(root: nn.Module) -> ResizePlan:
    """Return the changes that give a model the checks of its family for the size it is at."""
    handler, size = model_handler(root), current_size(root)
    none = ResizePlan(type(root).__name__, size, size or (0, 0))
    if handler is None or not handler.guarded:
        return none
    try:
        plan = plan_to(root, size, constructing=True)
    except ResizeError:  # a configuration of the user's own that we know nothing of: as stock
        return none
    return replace(plan, changes=tuple(filter(is_hook, plan)), warnings=())


def _outer_writes(outer: nn.Module, plan: ResizePlan) -> Writes:
    """Bring what a feature wrapper copied from its model up to date: the recorded size, the reductions."""
    new = {c.name: c.new for c in plan if c.path == "" and c.kind == "attribute"}
    writes: Writes = []
    if "_traits" in new and "_traits" in outer.__dict__:
        traits = {**outer.__dict__["_traits"], **{k: v for k, v in new["_traits"].items() if k in SIZE_TRAITS}}
        writes.append(partial(Transaction.attribute, owner=outer, name="_traits", new=traits))
    if "feature_info" in new and isinstance(outer.__dict__.get("feature_info"), FeatureInfo):
        reductions = {i["module"]: i["reduction"] for i in new["feature_info"]}
        info = copy.deepcopy(outer.__dict__["feature_info"])
        for entry in info.info:
            entry["reduction"] = reductions.get(entry["module"], entry["reduction"])
        writes.append(partial(Transaction.attribute, owner=outer, name="feature_info", new=info))
    return writes
