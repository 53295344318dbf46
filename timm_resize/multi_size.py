"""Several image sizes over one set of weights."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from timm_resize.core.buffers import new_buffers
from timm_resize.core.copies import own, shallow_copy
from timm_resize.core.find import current_size, find_model
from timm_resize.core.history import touched
from timm_resize.core.memory import check_memory
from timm_resize.core.plan import ResizePlan
from timm_resize.core.planner import plan_to
from timm_resize.core.request import ResizeOptions, make_request
from timm_resize.core.transaction import resizing, set_attribute, write_all
from timm_resize.core.values import like_parameter, model_writes
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, SizeLike, parse_size
from timm_resize.resample import Resample
from timm_resize.weights.names import path_in

Tensors = Mapping[str, Tensor | None]

Read = list[tuple[Tensor | None, tuple[object, ...]]]
"""Tensors with their versions and places, which tell whether they have changed since."""


@dataclass(frozen=True)
class _Kept:
    """A size's plan, what its tensors were computed from, and the model that holds them.

    Attributes:
        plan: From the canonical model to the size.
        copied: Path → canonical module, for every module that the model copies: changed ones and what holds them.
        seen: For each of these, the values of its `__dict__` and its children and tensors when it was copied.
        read: The canonical tensors that the plan changes, as they were when they were read.
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
        return all(map(_unchanged, self.copied.values(), self.seen)) and all(
            _place_of(tensor) == place for tensor, place in self.read
        )


class MultiSize(nn.Module):
    """Run one model at many image sizes, each as if it had been resized to it.

    Per size only what depends on the size exists, derived from the model's own tensors: on first use, kept up to
    `max_bytes` (the least recently used go first), and derived anew when a weight changes. Everything else is shared,
    running statistics included: a size's model copies module objects, not tensors.

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

    _biases: list[object]

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
        self._reset()
        self._register_load_state_dict_pre_hook(_add_prefix)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model, in what holds it, as resized to the images `x` (batch, channels, height, width)."""
        return self._holding(self.at((x.shape[-2], x.shape[-1])))(x, *args, **kwargs)

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

    def _holding(self, root: nn.Module) -> nn.Module:
        """Return what was given with a view of its timm model in the model's place."""
        if root is self._root:
            return self.model
        parts = self._path.split(".") if self._path else []
        for i in reversed(range(len(parts))):
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
        size = parse_size(img_size, "img_size", type(root).__name__)
        if size == current_size(root) and not self.options:
            self._forget_biases(root)
            return root
        kept = self._up_to_date(size)
        if torch.is_grad_enabled() and any(p.requires_grad for p in _parameters(root, kept.plan).values()):
            tensors = {**kept.tensors, **_resampled(root, kept.plan, graph=True)}
            return _assemble(root, kept.plan, kept.copied, tensors)
        return kept.model

    def _forget_biases(self, root: nn.Module) -> None:
        """Empty what LeViT-like attention keeps of its bias tables in eval where that would be wrong."""
        held = [m for m in root.modules() if m.__dict__.get("attention_bias_cache")]
        marks: list[object] = [_place_of(t) for m in held for t in m.parameters(recurse=False)]
        if held and (torch.is_grad_enabled() or marks != self._biases):
            for module in held:
                module.__dict__["attention_bias_cache"] = {}
        self._biases = marks

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
            made = old if old is not None and old.is_fresh else _make(self._root, size, self.options, old)
            with self._lock:
                self._kept[size] = made
                self._kept.move_to_end(size)
                while len(self._kept) > 1 and self.nbytes > self.max_bytes:
                    self._kept.popitem(last=False)
        return made

    def _used(self, size: Size) -> _Kept | None:
        with self._lock:
            if size in self._kept:
                self._kept.move_to_end(size)
            return self._kept.get(size)

    def _reset(self) -> None:
        self._kept: OrderedDict[Size, _Kept] = OrderedDict()
        self._biases = []
        self._lock, self._making = threading.RLock(), threading.RLock()

    def __getstate__(self) -> dict[str, object]:
        """Leave what is kept out: a copy makes its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_kept", "_lock", "_making")}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Start with nothing kept."""
        super().__setstate__(state)
        self._reset()
        self._load_state_dict_pre_hooks.clear()
        self._register_load_state_dict_pre_hook(_add_prefix)

    # -- the plain model's names -------------------------------------------------------------

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


def _add_prefix(state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Inside another module our keys have no `model.`, while the model is our child of that name."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}model.{key[len(prefix) :]}"] = state_dict.pop(key)


def _make(root: nn.Module, size: Size, options: ResizeOptions, old: _Kept | None) -> _Kept:
    """Make what is kept for a size, with tensors of `old` where nothing that they were computed from has changed."""
    plan = plan_to(root, size, **options)
    copied = _held(root, plan)
    seen, read = [_state(m) for m in copied.values()], _read(root, plan)
    if old is not None and old.plan == plan and _same(old.read, read):
        tensors = old.tensors
    else:
        check_memory(root, plan)
        tensors = {**_resampled(root, plan), **new_buffers(plan.modules(root), plan)}
    return _Kept(plan, copied, seen, read, tensors, _assemble(root, plan, copied, tensors))


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
    """Copy module objects, and give the copies a size's tensors and attributes.

    Hooks are shared: those registered on a module of the canonical model later on are seen at every size.
    """
    copies = {id(module): shallow_copy(module) for module in copied.values()}
    for copy in copies.values():
        for name, child in copy._modules.items():
            copy._modules[name] = copies.get(id(child), child)
    for change in plan:
        copy = copies[id(copied[change.path])]
        if change.kind == "attribute":
            set_attribute(copy, change.name, own(change.new))
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
    return {c.key: root.get_parameter(c.key) for c in plan if isinstance(c.how, Resample)}


def _resampled(root: nn.Module, plan: ResizePlan, graph: bool = False) -> dict[str, Tensor]:
    """Map the canonical parameters, within autograd's graph or apart from it."""
    maps = {c.key: c.how for c in plan if isinstance(c.how, Resample)}
    if graph:
        return {key: maps[key].differentiable(p) for key, p in _parameters(root, plan).items()}
    return {key: like_parameter(maps[key](p.detach()), p) for key, p in _parameters(root, plan).items()}


def _state(module: nn.Module) -> list[object]:
    """Return the very objects that a copy of the module would take over."""
    return [
        *module.__dict__.values(),
        *module._parameters.values(),
        *module._buffers.values(),
        *module._modules.values(),
    ]


def _read(root: nn.Module, plan: ResizePlan) -> Read:
    """Return the tensors that a plan changes, and what tells whether they have changed since."""
    modules = plan.modules(root)
    found = [
        modules[c.path]._parameters.get(c.name, modules[c.path]._buffers.get(c.name))
        for c in plan
        if c.kind != "attribute"
    ]
    return [(tensor, _place_of(tensor)) for tensor in found]


def _place_of(tensor: Tensor | None) -> tuple[object, ...]:
    if tensor is None:
        return ()
    version = 0 if tensor.is_inference() else tensor._version
    return (version, tensor.data_ptr() if not tensor.is_meta else 0, tensor.dtype, tensor.device)


def _unchanged(module: nn.Module, seen: list[object]) -> bool:
    now = _state(module)
    return len(now) == len(seen) and all(map(is_, now, seen))


def _same(old: Read, new: Read) -> bool:
    return len(old) == len(new) and all(a[0] is b[0] and a[1] == b[1] for a, b in zip(old, new, strict=True))


@contextmanager
def at_size(model: nn.Module, img_size: SizeLike, **options: Unpack[ResizeOptions]) -> Iterator[ResizePlan]:
    """Resize a model for the length of a `with` block; yields the plan.

    Afterwards, also after an exception, every bit and attribute is as before. If the block trained a tensor that
    depends on the size, the model is resized back instead, which keeps what was learnt. As with `resize_`, no other
    thread may run the model or back-propagate through it meanwhile; `MultiSize` is for that.

    Args:
        model: A timm model, or something that holds exactly one.
        img_size: An int or (H, W) in pixels.
        **options: As for `plan_resize`.

    Raises:
        InvalidSizeError: The size cannot work; nothing has changed.

    Example:
        >>> import timm, timm_resize, torch
        >>> model = timm.create_model("resmlp_12_224").eval()
        >>> with timm_resize.at_size(model, 96):
        ...     model(torch.randn(1, 3, 96, 96)).shape
        torch.Size([1, 1000])
        >>> model.stem.img_size
        (224, 224)
    """
    root = find_model(model)
    size = current_size(root)
    with resizing():
        plan = plan_to(root, img_size, **options)
        undo = write_all(model_writes(root, plan, {}))
    try:
        yield plan
    finally:
        with resizing():
            if not touched(root) and current_size(root) == plan.new_size:
                undo()
            elif size is not None:
                write_all(model_writes(root, plan_to(root, size), {}))
