"""The only file that writes to a module: compute everything, then write under an undo log."""

from __future__ import annotations

import copy
import os
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from timm_resize.buffers import new_buffers, own, set_attribute
from timm_resize.errors import ResizeError
from timm_resize.guard import GUARD, HOOK, check_input_size
from timm_resize.history import CHAIN, HISTORY, adopted, checkpoint_file, checkpoint_name, extended
from timm_resize.locate import SIZE_TRAITS, current_size, find_model, model_handler
from timm_resize.memory import check_memory
from timm_resize.plan import MISSING, ResizePlan
from timm_resize.planner import make_request, plan_request
from timm_resize.resample import Resample, serial

Writes = list[Callable[["Transaction"], None]]


class Transaction:
    """Writes that all happen or all do not: leaving by an exception undoes them in reverse order."""

    def __init__(self) -> None:
        """Start with an empty log."""
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for undo in reversed(self._undo):
                undo()
        self._undo.clear()

    def parameter(self, param: nn.Parameter, new: Tensor) -> None:
        """Give `param` new data, possibly of another shape; a pending gradient of another shape is dropped."""
        old, grad = param.data, param.grad

        def do() -> None:
            param.grad = None
            _reset_accumulator(param)
            param.data = new

        def undo() -> None:
            param.grad = None
            _reset_accumulator(param)
            param.data = old
            param.grad = grad

        self._log(do, undo)

    def gradient(self, param: nn.Parameter, new: Tensor | None) -> None:
        """Set a pending gradient."""
        old = param.grad
        self._log(lambda: setattr(param, "grad", new), lambda: setattr(param, "grad", old))

    def buffer(self, module: nn.Module, name: str, new: Tensor | None) -> None:
        """Replace a buffer; one that was not there becomes non-persistent."""
        buffers, transient = module._buffers, module._non_persistent_buffers_set
        known, old, was_transient = name in buffers, buffers.get(name), name in transient

        def do() -> None:
            buffers[name] = new
            if not known:
                transient.add(name)

        def undo() -> None:
            if known:
                buffers[name] = old
            else:
                buffers.pop(name, None)
            if not was_transient:
                transient.discard(name)

        self._log(do, undo)

    def attribute(self, owner: Any, name: str, new: Any) -> None:
        """Set an attribute; `MISSING` deletes it."""
        old = type(owner) if name == "__class__" else owner.__dict__.get(name, MISSING)
        self._log(lambda: set_attribute(owner, name, new), lambda: set_attribute(owner, name, old))

    def item(self, mapping: Any, key: Any, new: Any) -> None:
        """Set an entry of a dict, e.g. of an optimizer's state; `MISSING` deletes it."""
        old = mapping.get(key, MISSING)
        self._log(lambda: _set_item(mapping, key, new), lambda: _set_item(mapping, key, old))

    def _log(self, do: Callable[[], None], undo: Callable[[], None]) -> None:
        self._undo.append(undo)  # before: a write that breaks half-way is undone too
        _write(do)


def _write(do: Callable[[], None]) -> None:
    """Perform one write. Every write of this package passes here."""
    do()


def _set_item(mapping: Any, key: Any, value: Any) -> None:
    if value is MISSING:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _reset_accumulator(param: nn.Parameter) -> None:
    """Make autograd forget the parameter's old shape, which a graph that is still alive keeps.

    Assigning data of another dtype does it; of another shape alone does not (torch/csrc/autograd/variable.cpp).
    """
    other = torch.float64 if param.dtype != torch.float64 else torch.float32
    param.data = torch.empty(0, dtype=other, device=param.device)


_resizing = threading.RLock()


def resize_(model: nn.Module, img_size: Any = None, *, optimizer: Any = None, ema: Any = None, grad: str = "clear",
            **options: Any) -> ResizePlan:  # fmt: skip
    """Resize `model` in place, and with it the optimizers and EMA copies given.

    Parameters keep their identity, dtype, device, `requires_grad` and memory format. Either everything is
    written or, on any error, nothing.

    Args:
        model: A timm model, or something that holds exactly one.
        img_size: New size in pixels, an int or (H, W), or a plan that `plan_resize` made for this model.
        optimizer: One optimizer or several, whose state follows the weights.
        ema: One EMA copy of the model or several (ModelEmaV2/V3, AveragedModel, or a plain copy).
        grad: What becomes of pending gradients of tensors that change: "clear", or "resample" by the weight's map,
            for a resize in the midst of accumulation.
        **options: As for `plan_resize`.

    Returns:
        The plan that was applied; empty when there was nothing to do. Its notes name optimizer state that could not
        follow and starts afresh.

    Raises:
        InvalidSizeError: The size cannot work.
        StalePlanError: A given plan does not fit the model's present state.
        ResizeError: As `plan_resize`.

    Example:
        >>> import timm, timm_resize
        >>> model = timm.create_model("levit_128s")
        >>> plan = timm_resize.resize_(model, 256)
        >>> plan.new_size, len(plan.tensors)
        ((256, 256), 14)
    """
    root = find_model(model)
    if grad not in ("clear", "resample"):
        raise ResizeError(f"{type(root).__name__}: grad={grad!r} is not known. Use 'clear' or 'resample'.")
    if isinstance(img_size, ResizePlan) and options:
        raise ResizeError(f"{type(root).__name__}: a plan takes no further options. Make the plan with them.")
    with _resizing:  # threads take turns, from the plan to the last write
        plan = img_size
        if not isinstance(plan, ResizePlan):
            plan = plan_request(root, make_request(type(root).__name__, img_size, **options))
        remarks = apply_plan(root, plan, optimizer=optimizer, ema=ema, options=options, outer=model, grad=grad)
    return replace(plan, notes=(*plan.notes, *remarks)) if remarks else plan


def apply_plan(root: nn.Module, plan: ResizePlan, *, optimizer: Any = None, ema: Any = None,
               options: dict[str, Any] | None = None, outer: nn.Module | None = None,
               grad: str = "clear") -> list[str]:  # fmt: skip
    """Compute every new value of `plan`, then write them all, for the model and what follows it.

    `outer` is a wrapper of `root` that may carry a copy of its traits (timm's feature wrappers do). Returns remarks
    on what followed the model: state that had to start afresh.
    """
    from timm_resize.training import optimizer_writes

    with torch.inference_mode(False), torch.no_grad(), _resizing:
        maps: dict[nn.Parameter, Resample] = {}
        remarks: list[str] = []
        writes = model_writes(root, plan, maps)
        if outer is not None and outer is not root:
            writes += _outer_writes(outer, plan)
        for copy_ in _several(ema):
            writes += _ema_writes(root, copy_, plan, options or {})
        names = {} if optimizer is None else {id(p): name for name, p in root.named_parameters()}
        for one in _several(optimizer):
            more, said = optimizer_writes(one, maps, names)
            writes += more
            remarks += said
        if grad == "resample":
            writes += _gradient_writes(maps)
        refuse_running(root)
        with Transaction() as transaction:
            for write in writes:
                write(transaction)
    for text in plan.warnings:
        warnings.warn(f"{plan.model}: {text}", stacklevel=3)
    return remarks


def refuse_running(root: nn.Module) -> None:
    """Raise ResizeError while another thread is inside the model: half of its forward would be of another size.

    Seen in the threads' stacks, so that a forward pays nothing. One that starts while the writes go on, about a
    millisecond, is not seen.
    """
    if threading.active_count() == 1:
        return
    here = threading.get_ident()
    for thread, top in sys._current_frames().items():
        frame = top if thread != here else None
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",) and frame.f_locals.get("self") is root:
                raise ResizeError(
                    f"{type(root).__name__}: another thread is in its {frame.f_code.co_name}. Wait for it, or serve "
                    "several sizes at once with timm_resize.MultiSize."
                )
            frame = frame.f_back


def _gradient_writes(maps: dict[nn.Parameter, Resample]) -> Writes:
    """Send pending gradients through the maps of their weights, as momentum goes; before, they are still there."""
    new = {p: how(p.grad) for p, how in maps.items() if p.grad is not None}
    return [lambda t, p=p, g=g: t.gradient(p, g) for p, g in new.items()]  # type: ignore[misc]


def guard_(root: nn.Module) -> None:
    """Give a model its guard for the size it is at, where its family has one; nothing else changes."""
    handler = model_handler(root)
    if handler is None or not handler.guarded:
        return
    try:
        plan = plan_request(root, make_request(type(root).__name__, current_size(root), constructing=True))
    except ResizeError:  # a configuration of the user's own that we know nothing of: as stock
        return
    guards = tuple(change for change in plan if change.name == GUARD)
    if guards:
        apply_plan(root, replace(plan, changes=guards, warnings=()))


def _outer_writes(outer: nn.Module, plan: ResizePlan) -> Writes:
    """Bring what a feature wrapper copied from its model up to date: the recorded size, the reductions."""
    new = {c.name: c.new for c in plan if c.path == "" and c.kind == "attribute"}
    writes: Writes = []
    if "_traits" in new and "_traits" in outer.__dict__:
        traits = {**outer.__dict__["_traits"], **{k: v for k, v in new["_traits"].items() if k in SIZE_TRAITS}}
        writes.append(lambda t: t.attribute(outer, "_traits", traits))
    if "feature_info" in new and isinstance(outer.__dict__.get("feature_info"), FeatureInfo):
        reductions = {i["module"]: i["reduction"] for i in new["feature_info"]}
        info = copy.deepcopy(outer.__dict__["feature_info"])
        for entry in info.info:
            entry["reduction"] = reductions.get(entry["module"], entry["reduction"])
        writes.append(lambda t: t.attribute(outer, "feature_info", info))
    return writes


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _ema_writes(root: nn.Module, ema: nn.Module, plan: ResizePlan, options: dict[str, Any]) -> Writes:
    copy_ = find_model(ema)
    request = make_request(type(copy_).__name__, plan.new_size, **options)
    twin = plan_request(copy_, request)
    if (
        type(copy_) is not type(root)
        or [c.key for c in twin] != [c.key for c in plan]
        or twin.old_size != plan.old_size
    ):
        raise ResizeError(
            f"{plan.model}: ema is a {twin.model} at {twin.old_size}, the model is at {plan.old_size}. "
            "Give the EMA copy of this model, made at its present size."
        )
    return model_writes(copy_, twin, {})


def model_writes(root: nn.Module, plan: ResizePlan, maps: dict[nn.Parameter, Resample]) -> Writes:
    """Compute the plan's values for `root`; return the writes, and in `maps` the map of each parameter."""
    plan.check(root)
    check_memory(root, plan)
    chain, changed = dict(getattr(root, CHAIN, {})), list[str]()
    modules = plan.modules(root)
    buffers = new_buffers(modules, plan)
    resampled = _resampled(modules, plan, chain, changed)
    writes: Writes = []
    for change in plan:
        module = modules[change.path]
        if change.kind == "parameter" and isinstance(change.how, Resample):
            param = module._parameters[change.name]
            assert param is not None
            new, maps[param] = resampled[change.key], change.how
            writes.append(lambda t, p=param, n=new: t.parameter(p, n))  # type: ignore[misc]
        elif change.kind == "buffer":
            value = buffers[change.key]
            writes.append(lambda t, m=module, n=change.name, v=value: t.buffer(m, n, v))  # type: ignore[misc]
        else:
            value = own(change.new)
            writes.append(lambda t, m=module, n=change.name, v=value: t.attribute(m, n, v))  # type: ignore[misc]
            if change.name == GUARD:
                hooks = module._forward_pre_hooks
                writes.append(lambda t, h=hooks: t.item(h, HOOK, check_input_size))  # type: ignore[misc]
    if any(change.name != GUARD for change in plan):  # also without a tensor: it tells that the model was resized
        events = extended(getattr(root, HISTORY, ()), plan, changed)
        writes.append(lambda t: t.attribute(root, CHAIN, chain))
        writes.append(lambda t: t.attribute(root, HISTORY, events))
    return writes


def adopt_(root: nn.Module, path: str | None = None, plan: ResizePlan | None = None) -> None:
    """Start the history of a model that was just loaded: from a file, by default that of its `pretrained_cfg`.

    What its tensors were before, random values or others, is forgotten. `plan` is what the file's tensors went
    through.
    """
    config: dict[str, Any] = getattr(root, "pretrained_cfg", None) or {}
    name = os.path.basename(path) if path else checkpoint_name(config) or "?"
    events = adopted(path or checkpoint_file(config), name)
    if path and not events:
        events = ({"checkpoint": name, "img_size": list((plan.old_size if plan else current_size(root)) or ())},)
    if events or hasattr(root, CHAIN):
        root._resize_chain, root._resize_history = {}, extended(events, plan) if plan else events  # type: ignore


def _resampled(modules: dict[str, Any], plan: ResizePlan, chain: dict[str, Any],
               changed: list[str]) -> dict[str, Tensor]:  # fmt: skip
    """Return the new parameters, equal maps of equal shapes done together; updates their links in `chain`.

    A tensor that nothing touched since the last resize is resampled from its original.
    """
    groups: dict[Any, list[tuple[str, nn.Parameter, Tensor, Any]]] = {}
    for change in plan:
        how = change.how
        if change.kind != "parameter" or not isinstance(how, Resample):
            continue
        param = modules[change.path]._parameters[change.name]
        origin, source, link = param.detach(), how.source, chain.pop(change.key, None)
        if link is not None and _untouched(link["applied"], param):
            origin, source = link["origin"].to(param.device), link["source"]
            how = how.rebase(source)
        elif link is not None:
            changed.append(change.key)
        groups.setdefault((how, origin.shape, origin.dtype, origin.device), []).append(
            (change.key, param, origin, source)
        )
    out: dict[str, Tensor] = {}
    for (how, *_), members in groups.items():
        for (key, param, origin, source), value in zip(members, how.each([m[2] for m in members]), strict=True):
            out[key] = new = _like(value, param)
            if not how.is_identity:
                kept = serial.copied(origin) if origin.data_ptr() == param.data_ptr() else origin
                chain[key] = {"origin": kept, "source": source, "applied": serial.copied(new)}
    return out


def _untouched(applied: Tensor, param: Tensor) -> bool:
    if applied.is_meta or param.is_meta:
        return applied.shape == param.shape
    return applied.shape == param.shape and serial.equal(applied.to(param), param.detach())


def touched(root: nn.Module) -> list[str]:
    """Return the names of resampled tensors of a model that no longer hold the bits that the resize wrote."""
    state, links = dict(root.named_parameters()), getattr(root, CHAIN, {})
    return [key for key, link in links.items() if key not in state or not _untouched(link["applied"], state[key])]


def _like(new: Tensor, param: Tensor) -> Tensor:
    """Return `new` in the parameter's dtype and memory format."""
    channels_last = param.dim() == 4 and not param.is_contiguous() and param.is_contiguous(
        memory_format=torch.channels_last)  # fmt: skip
    return new.to(param.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
