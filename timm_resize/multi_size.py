"""Several image sizes over one set of weights."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from timm_resize.core.apply import refuse_running
from timm_resize.core.buffers import new_buffers
from timm_resize.core.copies import own, shallow_copy
from timm_resize.core.find import current_size, find_model
from timm_resize.core.history import touched
from timm_resize.core.memory import check_memory
from timm_resize.core.plan import ResizePlan
from timm_resize.core.planner import plan_request
from timm_resize.core.request import make_request
from timm_resize.core.transaction import Transaction, set_attribute, writing
from timm_resize.core.values import like_parameter, model_writes
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, parse_size
from timm_resize.resample import Resample


@dataclass
class _View:
    """A size's plan, what its tensors were computed from, and the model that holds them.

    Attributes:
        plan: From the canonical model to the size.
        copied: Path → canonical module, for every module that the view copies: changed ones and what holds them.
        seen: For each of these, the values of its `__dict__` and its children and tensors when it was copied.
        read: The canonical tensors that the plan changes, with their versions and places when they were read.
        tensors: Key → resampled parameter or rebuilt buffer.
        model: The copy; None while the next is being made.
    """

    plan: ResizePlan
    copied: dict[str, nn.Module]
    seen: list[list[Any]] = field(default_factory=list)
    read: list[Any] = field(default_factory=list)
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    model: nn.Module | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that exist for this size alone."""
        distinct = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors.values() if t is not None
        }
        return sum(distinct.values())


class MultiSize(nn.Module):
    """Run one model at many image sizes, each as if it had been resized to it.

    Per size only what depends on the size exists, derived from the model's own tensors: on first use, kept up to
    `max_bytes` (the least recently used go first), and derived anew when a weight changes. Everything else is shared,
    running statistics included: a size's view copies module objects, not tensors. Two threads may run two sizes, or the
    same, at once.

    While gradients are recorded, those of every size flow through the (linear) resampling into the model's one
    Parameter, so training at several sizes, multi-crop included, works for every family. Parameters and state dict
    are the plain model's.

    Args:
        model: A timm model, at the size that its weights are kept at, or something that holds exactly one.
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

    def __init__(self, model: nn.Module, *, max_bytes: int = 1 << 28, **options: Any) -> None:
        """Check that the model can be resized; nothing is computed yet."""
        super().__init__()
        if not isinstance(max_bytes, int) or max_bytes < 0:
            raise ResizeError(f"MultiSize: max_bytes={max_bytes!r} is not a number of bytes. Use 2**28 for 256 MiB.")
        self.model = find_model(model)
        self.max_bytes = max_bytes
        self.options = dict(options)
        make_request(type(self.model).__name__, **options)
        self._reset()
        self._register_load_state_dict_pre_hook(_add_prefix)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model as resized to the images `x` (batch, channels, height, width)."""
        return self.at((x.shape[-2], x.shape[-1]))(x, *args, **kwargs)

    def at(self, img_size: Any) -> nn.Module:
        """Return the model as resized to a size: an ordinary timm model that shares what does not depend on the size.

        For everything beyond `forward`: features, export, data configuration. Under recorded gradients its resampled
        tensors are part of this moment's graph, so ask again for each forward.

        Raises:
            InvalidSizeError: The size cannot work; the message names the nearest that can.
        """
        size = parse_size(img_size, "img_size", type(self.model).__name__)
        if size == current_size(self.model) and not self.options:
            return self.model
        view = self._view(size)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in _parameters(self.model, view.plan).values())
        if trained:
            return _assemble(self.model, view, {**view.tensors, **_resampled(self.model, view.plan, graph=True)})
        assert view.model is not None
        return view.model

    def clear(self) -> None:
        """Forget every size's tensors."""
        with self._lock:
            self._views.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of all kept sizes take."""
        return sum(view.nbytes for view in self._views.values())

    @property
    def sizes(self) -> list[Size]:
        """Sizes that are kept, the least recently used first."""
        return list(self._views)

    def _view(self, size: Size) -> _View:
        """Return an up-to-date view, made or mended under the lock."""
        view = self._views.get(size)
        if view is not None and _fresh(view):
            if next(reversed(self._views)) != size:
                with self._lock:
                    if size in self._views:
                        self._views.move_to_end(size)
            return view
        with self._lock, torch.inference_mode(False), torch.no_grad():
            made = _make(self.model, size, self.options, self._views.get(size))
            self._views[size] = made
            self._views.move_to_end(size)
            while len(self._views) > 1 and self.nbytes > self.max_bytes:
                self._views.popitem(last=False)
        return made

    def _reset(self) -> None:
        self._views: OrderedDict[Size, _View] = OrderedDict()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the views out: a copy makes its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_views", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without views."""
        super().__setstate__(state)
        self._reset()
        self._load_state_dict_pre_hooks.clear()
        self._register_load_state_dict_pre_hook(_add_prefix)

    # -- the plain model's names -------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the plain model's state dict."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the plain model's state dict."""
        return self.model.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the plain model's parameters by its names."""
        return self.model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield the plain model's buffers by its names."""
        return self.model.named_buffers(*args, **kwargs)


def _add_prefix(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Inside another module our keys have no `model.`, while the model is our child of that name."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}model.{key[len(prefix) :]}"] = state_dict.pop(key)


def _make(root: nn.Module, size: Size, options: dict[str, Any], old: _View | None) -> _View:
    """Return a view; tensors of `old` are taken over where nothing that they were computed from has changed."""
    plan = plan_request(root, make_request(type(root).__name__, size, **options))
    view = _View(plan, _held(root, plan))
    view.seen = [_state(m) for m in view.copied.values()]
    view.read = _versions(root, plan)
    if old is not None and old.plan == plan and _same(old.read, view.read):
        view.tensors = old.tensors
    else:
        check_memory(root, plan)
        view.tensors = {**_resampled(root, plan), **new_buffers(plan.modules(root), plan)}
    view.model = _assemble(root, view, view.tensors)
    return view


def _held(root: nn.Module, plan: ResizePlan) -> dict[str, nn.Module]:
    """Return the modules that a plan changes and all that hold them, by path, the root first."""
    changed = {id(root.get_submodule(c.path)) for c in plan} | {id(root)}
    out: dict[str, nn.Module] = {}
    for path, module in root.named_modules(remove_duplicate=False):  # a shared module, by all of its paths
        if id(module) in changed:
            parts = path.split(".") if path else []
            for i in range(len(parts) + 1):
                above = ".".join(parts[:i])
                out[above] = root.get_submodule(above)
    return out


def _assemble(root: nn.Module, view: _View, tensors: dict[str, Tensor | None]) -> nn.Module:
    """Copy the module objects of a view, and give the copies its tensors and attributes.

    Hooks are shared: those registered on a module of the canonical model later on are seen by every view.
    """
    twins: dict[int, nn.Module] = {}
    for module in view.copied.values():
        if id(module) not in twins:
            twins[id(module)] = shallow_copy(module)
    for twin in twins.values():
        for name, child in twin._modules.items():
            if id(child) in twins:
                twin._modules[name] = twins[id(child)]
    for change in view.plan:
        twin = twins[id(view.copied[change.path])]
        if change.kind == "attribute":
            set_attribute(twin, change.name, own(change.new))
        elif change.kind == "buffer":
            if change.name not in twin._buffers:
                twin._non_persistent_buffers_set.add(change.name)
            twin._buffers[change.name] = tensors[change.key]
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        owner = view.copied.get(path)
        if owner is not None and name in owner._parameters:
            _place(twins, root, owner._parameters[name], tensor)
    return twins[id(root)]


def _place(twins: dict[int, nn.Module], root: nn.Module, param: Any, tensor: Any) -> None:
    """Put a resampled tensor wherever the canonical parameter is, ties included: a plain attribute of that name."""
    for twin in twins.values():
        for name in [n for n, p in twin._parameters.items() if p is param]:
            del twin._parameters[name]
            twin.__dict__[name] = tensor


def _parameters(root: nn.Module, plan: ResizePlan) -> dict[str, nn.Parameter]:
    return {c.key: root.get_parameter(c.key) for c in plan if isinstance(c.how, Resample)}


def _resampled(root: nn.Module, plan: ResizePlan, graph: bool = False) -> dict[str, Tensor]:
    """Map the canonical parameters, within autograd's graph or apart from it."""
    maps = {c.key: c.how for c in plan if isinstance(c.how, Resample)}
    if graph:
        return {key: maps[key].differentiable(p) for key, p in _parameters(root, plan).items()}
    return {key: like_parameter(maps[key](p.detach()), p) for key, p in _parameters(root, plan).items()}


def _state(module: nn.Module) -> list[Any]:
    """Return the very objects that a copy of the module would take over."""
    return [
        *module.__dict__.values(),
        *module._parameters.values(),
        *module._buffers.values(),
        *module._modules.values(),
    ]


def _versions(root: nn.Module, plan: ResizePlan) -> list[Any]:
    """Return what tells whether the tensors that a plan reads have changed since: they, their versions and places."""
    out: list[Any] = []
    for change in plan:
        if change.kind != "attribute":
            module = root.get_submodule(change.path)
            tensor = module._parameters.get(change.name, module._buffers.get(change.name))
            out.append((tensor, *_place_of(tensor)))
    return out


def _place_of(tensor: Tensor | None) -> tuple[Any, ...]:
    if tensor is None:
        return ()
    version = 0 if tensor.is_inference() else tensor._version
    return (version, tensor.data_ptr() if not tensor.is_meta else 0, tensor.dtype, tensor.device)


def _fresh(view: _View) -> bool:
    """Whether nothing that the view was made from has changed since."""
    return all(map(_unchanged, view.copied.values(), view.seen)) and all(
        _place_of(tensor) == tuple(place) for tensor, *place in view.read
    )


def _unchanged(module: nn.Module, seen: list[Any]) -> bool:
    now = _state(module)
    return len(now) == len(seen) and all(map(is_, now, seen))


def _same(old: list[Any], new: list[Any]) -> bool:
    return len(old) == len(new) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new, strict=True))


@contextmanager
def at_size(model: nn.Module, img_size: Any, **options: Any) -> Iterator[ResizePlan]:
    """Resize a model for the length of a `with` block; yields the plan.

    Afterwards, also after an exception, every bit and attribute is as before. If the block trained a tensor that
    depends on the size, the model is resized back instead, which keeps what was learnt.

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
    with torch.inference_mode(False), torch.no_grad(), writing:
        plan = plan_request(root, make_request(type(root).__name__, img_size, **options))
        refuse_running(root)
        with Transaction() as transaction:
            for write in model_writes(root, plan, {}):
                write(transaction)
            undo = list(transaction._undo)
    try:
        yield plan
    finally:
        with torch.inference_mode(False), torch.no_grad(), writing:
            if not touched(root) and current_size(root) == plan.new_size:
                for step in reversed(undo):
                    step()
            elif size is not None:
                _resize_back(root, size)


def _resize_back(root: nn.Module, size: Size) -> None:
    with Transaction() as transaction:
        for write in model_writes(root, plan_request(root, make_request(type(root).__name__, size)), {}):
            write(transaction)
