"""Several image sizes over one set of weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from timm_resize.core.apply import planned_checks
from timm_resize.core.buffers import new_buffers
from timm_resize.core.caches import Seen
from timm_resize.core.copies import own, shallow_copy
from timm_resize.core.find import find_model
from timm_resize.core.locks import Lock
from timm_resize.core.memory import check_memory
from timm_resize.core.plan import CACHE, Change, Rebuild, ResizePlan, tensor_of
from timm_resize.core.planner import plan_to
from timm_resize.core.request import ResizeOptions, make_request
from timm_resize.core.transaction import set_attribute
from timm_resize.core.values import like_parameter
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, SizeLike, parse_size
from timm_resize.resample import Resample
from timm_resize.weights.names import path_in

Tensors = Mapping[str, Tensor | None]

Read = list[tuple[Tensor, Seen]]
"""Tensors, and what they were when something was computed from them."""


@dataclass(frozen=True)
class _Kept:
    """A size's plan, what its tensors were computed from, and the model that holds them.

    Attributes:
        plan: From the canonical model to the size.
        copied: Path → canonical module, for every module that the model copies: changed ones and what holds them.
        seen: For each of these, the values of its `__dict__` and its children and tensors when it was copied.
        read: The canonical tensors that something was computed from, as they were then.
        tensors: Key → resampled parameter or rebuilt buffer.
        model: The copy.
    """

    plan: ResizePlan
    copied: dict[str, nn.Module]
    seen: list[list[object]]
    read: Read
    tensors: Tensors
    model: nn.Module

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that exist for this size alone."""
        distinct = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors.values() if t is not None
        }
        return sum(distinct.values())

    @property
    def is_fresh(self) -> bool:
        """Whether nothing that the model was made from has changed since."""
        same_objects = all(map(_unchanged, self.copied.values(), self.seen))
        return same_objects and all(seen.still(tensor) for tensor, seen in self.read)


class MultiSize(nn.Module):
    """Run one model at many image sizes, each as if it had been resized to it.

    Per size only what depends on the size exists, derived from the model's own tensors: on first use, kept up to
    `max_bytes` (the least recently used go first), and derived anew when a weight changes. Everything else is shared,
    running statistics included until `recalibrate_` measures them: a size's model copies module objects, not tensors.

    A change of a weight is seen by its value on the CPU. Elsewhere torch's own count of writes tells, which an in-place
    write through `.data` escapes: call `clear()` after one.

    For serving while sizes change: threads may run any sizes at once. A forward keeps what it runs on, so first uses of
    other sizes, evictions and `clear()` do not disturb it. What writes to the weights (a step of an optimizer, a
    `load_state_dict`, a resize of the model itself) does, as it would without this class.

    While gradients are recorded, those of every size flow through the (linear) resampling into the model's one
    Parameter, so training at several sizes, multi-crop included, works for every family. Parameters and state dict
    are the plain model's.

    Args:
        model: A timm model, at the size that its weights are kept at, or what holds exactly one and is run whole.
        max_bytes: Most bytes that the size-dependent tensors of all sizes may take together.
        **options: As for `plan_resize`, for every size.

    Example:
        >>> import timm, timm_resize, torch
        >>> multi = timm_resize.MultiSize(timm.create_model("levit_128s").eval())
        >>> [multi(torch.randn(1, 3, *size)).shape for size in ((224, 224), (96, 160))]
        [torch.Size([1, 1000]), torch.Size([1, 1000])]
        >>> multi.at((96, 160)).stages[0].blocks[0].attn.resolution
        (6, 10)
    """

    def __init__(self, model: nn.Module, *, max_bytes: int = 1 << 28, **options: Unpack[ResizeOptions]) -> None:
        """Check that the model can be resized; nothing is computed yet."""
        super().__init__()
        if not isinstance(max_bytes, int) or max_bytes < 0:
            text = f"MultiSize: max_bytes={max_bytes!r} is not a number of bytes. Use 2**28 for 256 MiB."
            raise ResizeError(text, model="MultiSize", argument="max_bytes", value=max_bytes)
        while "_orig_mod" in model._modules:  # what torch.compile made runs the one model that it compiled
            model = model.get_submodule("_orig_mod")
        self._path = path_in(model, find_model(model))
        self.model = model
        self.max_bytes = max_bytes
        self.options = options
        make_request(type(self._root).__name__, **options)
        self._statistics: dict[Size, tuple[Change, ...]] = {}
        self._reset()
        self._register_load_state_dict_pre_hook(_add_prefix)

    @torch.compiler.disable(recursive=False)  # each view, an ordinary model, has a whole graph of its own
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, in what holds it, as resized to the images (batch, channels, height, width) that it is given.

        They are the first argument with four dimensions, by position or by name.
        """
        return self._at(_images(args, kwargs).shape)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return what this module has not from the model, whose configuration and groups training loops ask for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)

    @property
    def _root(self) -> nn.Module:
        """The timm model in what was given."""
        return self.model.get_submodule(self._path)

    @torch.compiler.disable
    def _at(self, shape: torch.Size) -> nn.Module:
        return self._holding(self.at((shape[-2], shape[-1])))

    def _holding(self, root: nn.Module) -> nn.Module:
        """Return what was given with a view of its timm model in the model's place."""
        if root is self._root:
            return self.model
        parts = self._path.split(".") if self._path else []
        inside = [i for i in range(len(parts)) if parts[i] != "_orig_mod"]  # torch.compile runs what it compiled
        for i in reversed(inside):
            holder = shallow_copy(self.model.get_submodule(".".join(parts[:i])))
            holder._modules[parts[i]] = root
            root = holder
        return root

    def at(self, img_size: SizeLike) -> nn.Module:
        """Return the model as resized to a size: an ordinary timm model that shares what does not depend on the size.

        For everything beyond `forward`: features, export, data configuration. Under recorded gradients its resampled
        tensors are part of this moment's graph, so ask again for each forward.

        Raises:
            InvalidSizeError: The size cannot work; the message names the nearest that can.
        """
        root = self._root
        kept = self._up_to_date(parse_size(img_size, "img_size", type(root).__name__))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor, _ in kept.read):
            tensors = {**kept.tensors, **_resampled(root, kept.plan, graph=True)}
            return _assemble(root, kept.plan, kept.copied, tensors)
        return kept.model

    def set_statistics(self, img_size: SizeLike, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Give a size batch-norm statistics of its own, as `recalibrate_` does: path in `model` → mean, variance.

        They are no part of the state dict, which is the plain model's. Other sizes keep theirs, or the model's.
        """
        changes = []
        size, inside = parse_size(img_size, "img_size", type(self._root).__name__), f"{self._path}." * bool(self._path)
        for path, pair in values.items():
            if not path.startswith(inside):
                raise ResizeError(f"MultiSize: {path} is not in the model at {self._path}, and all sizes share it.")
            for name, value in zip(("running_mean", "running_var"), pair, strict=True):
                shape, how = tuple(value.shape), Rebuild(_Given(value), label="measured")
                changes.append(Change(path.removeprefix(inside), name, "buffer", shape, shape, how))
        with self._making:
            self._statistics = {**self._statistics, size: tuple(changes)}
            with self._lock:
                self._kept.pop(size, None)

    def clear(self) -> None:
        """Forget every size's tensors."""
        with self._lock:
            self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of all kept sizes take."""
        with self._lock:
            return sum(kept.nbytes for kept in self._kept.values())

    @property
    def sizes(self) -> list[Size]:
        """Sizes that are kept, the least recently used first."""
        with self._lock:
            return list(self._kept)

    def _up_to_date(self, size: Size) -> _Kept:
        """Return what is kept for a size, made anew if need be by one thread at a time; others go on meanwhile."""
        kept = self._used(size)
        if kept is not None and kept.is_fresh:
            return kept
        with self._making, torch.inference_mode(False), torch.no_grad():
            old = self._used(size)  # another thread may have made it meanwhile
            made = old if old is not None and old.is_fresh else self._make(size, old)
            with self._lock:
                self._kept[size] = made
                self._kept.move_to_end(size)
                while len(self._kept) > 1 and self.nbytes > self.max_bytes:
                    self._kept.popitem(last=False)
        return made

    def _make(self, size: Size, old: _Kept | None) -> _Kept:
        """Make what is kept for a size, with tensors of `old` where what they were computed from is as it was."""
        root = self._root
        plan = _plan(root, size, self.options)
        plan = replace(plan, changes=(*plan.changes, *self._statistics.get(size, ())))
        copied = _held(root, plan)
        seen = [_state(m) for m in copied.values()]
        with self._lock:  # sizes share what tells a change
            known = {id(t): was for kept in self._kept.values() for t, was in kept.read if was.still(t)}
        read = [(tensor, known.get(id(tensor)) or Seen(tensor)) for tensor in _read(root, plan)]
        if old is not None and old.plan == plan and [was for _, was in old.read] == [was for _, was in read]:
            tensors = old.tensors
        else:
            check_memory(root, plan, in_place=False)
            tensors = {**_resampled(root, plan), **new_buffers(plan.modules(root), plan)}
        return _Kept(plan, copied, seen, read, tensors, _assemble(root, plan, copied, tensors))

    def _used(self, size: Size) -> _Kept | None:
        with self._lock:
            if size in self._kept:
                self._kept.move_to_end(size)
            return self._kept.get(size)

    def _reset(self) -> None:
        self._kept: OrderedDict[Size, _Kept] = OrderedDict()
        self._lock, self._making = Lock(), Lock()

    def __getstate__(self) -> dict[str, object]:
        """Leave what is kept out: a copy makes its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_kept", "_lock", "_making")}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Start with nothing kept."""
        super().__setstate__(state)
        self._reset()
        self._load_state_dict_pre_hooks.clear()
        self._register_load_state_dict_pre_hook(_add_prefix)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the plain model's state dict."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the plain model's state dict."""
        return self.model.load_state_dict(state_dict, strict, assign)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the plain model's parameters by its names."""
        return self.model.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the plain model's buffers by its names."""
        return self.model.named_buffers(prefix, recurse, remove_duplicate)


@dataclass(frozen=True, eq=False)
class _Given:
    """The rule of a buffer that was measured."""

    value: Tensor

    def __call__(self, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self.value.to(device, dtype)


@torch.compiler.disable
def _images(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first tensor of a call that has four dimensions; the first of all where none has."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        raise ResizeError("MultiSize: there are no images to run. Give a tensor (batch, channels, height, width).")
    return next((value for value in tensors if value.dim() == 4), tensors[0])


def _add_prefix(state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Inside another module our keys have no `model.`, while the model is our child of that name."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}model.{key[len(prefix) :]}"] = state_dict.pop(key)


def _plan(root: nn.Module, size: Size, options: ResizeOptions) -> ResizePlan:
    """Plan a size; at the model's own what modules keep of their weights is still to be a view's alone."""
    plan = plan_to(root, size, **options)
    return plan or replace(plan, changes=tuple(c for c in planned_checks(root) if c.old is CACHE))


def _held(root: nn.Module, plan: ResizePlan) -> dict[str, nn.Module]:
    """Return the modules that a plan changes and all that hold them, by path, the root first."""
    changed = {id(module) for module in (root, *plan.modules(root).values())}
    out: dict[str, nn.Module] = {}
    for path, module in root.named_modules(remove_duplicate=False):  # a shared module, by all of its paths
        if id(module) in changed:
            parts = path.split(".") if path else []
            for i in range(len(parts) + 1):
                above = ".".join(parts[:i])
                out[above] = root.get_submodule(above)
    return out


def _assemble(root: nn.Module, plan: ResizePlan, copied: dict[str, nn.Module], tensors: Tensors) -> nn.Module:
    """Copy module objects, and give the copies a size's tensors and attributes; the model itself where none change.

    Hooks are shared: those registered on a module of the canonical model later on are seen at every size.
    """
    if not plan:
        return root
    copies = {id(module): shallow_copy(module) for module in copied.values()}
    for copy in copies.values():
        for name, child in copy._modules.items():
            copy._modules[name] = copies.get(id(child), child)
    values: dict[int, Any] = {}
    for change in plan:
        copy = copies[id(copied[change.path])]
        if change.kind == "attribute":
            set_attribute(copy, change.name, own(change.new, values))
        elif change.kind == "buffer":
            if change.name not in copy._buffers:
                copy._non_persistent_buffers_set.add(change.name)
            copy._buffers[change.name] = tensors[change.key]
    for key, param in _parameters(root, plan).items():
        for copy in copies.values():  # wherever the parameter is, ties included: a plain attribute of that name
            for name in [n for n, p in copy._parameters.items() if p is param]:
                del copy._parameters[name]
                copy.__dict__[name] = tensors[key]
    return copies[id(root)]


def _parameters(root: nn.Module, plan: ResizePlan) -> dict[str, nn.Parameter]:
    return {c.key: root.get_parameter(c.key) for c in plan if c.kind == "parameter"}


def _resampled(root: nn.Module, plan: ResizePlan, graph: bool = False) -> dict[str, Tensor]:
    """Map the canonical tensors, within autograd's graph or apart from it."""
    modules, out = plan.modules(root), dict[str, Tensor]()
    for change in plan:
        if isinstance(change.how, Resample):
            tensor = tensor_of(modules[change.path], change)
            assert tensor is not None
            mapped = change.how.differentiable(tensor) if graph else like_parameter(change.how(tensor.detach()), tensor)
            out[change.key] = mapped
    return out


def _state(module: nn.Module) -> list[object]:
    """Return the very objects that a copy of the module would take over."""
    return [
        *module.__dict__.values(),
        *module._parameters.values(),
        *module._buffers.values(),
        *module._modules.values(),
    ]


def _read(root: nn.Module, plan: ResizePlan) -> list[Tensor]:
    """Return the tensors that something is computed from: those that a plan resamples, and those of caches."""
    modules, found = plan.modules(root), list[Tensor | None]()
    for change in plan:
        if isinstance(change.how, Resample):
            found.append(tensor_of(modules[change.path], change))
        elif change.old is CACHE:
            found += modules[change.path]._parameters.values()
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())


def _unchanged(module: nn.Module, seen: list[object]) -> bool:
    now = _state(module)
    return len(now) == len(seen) and all(map(is_, now, seen))
