"""Build a model without computing initial values that a checkpoint replaces.

Drawing them is most of what stock's `create_model(pretrained=True)` does: a large ViT comes from a file three to five
times as fast without (docs/speed.md). Building on the meta device would be simpler, but leaves nothing to initialise
a new head with, or a buffer that no file holds. So while `skipped` is active in a thread, a large tensor that is
allocated empty stays so: in-place fills of it, random or constant, are noted down, not run. A copy over the whole
tensor forgets the notes; reading it in any way runs them first. At the end what nobody replaced gets what its own
initialisers noted. So every value is stock's; only the order in which random numbers are drawn is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

Args: TypeAlias = tuple[Any, ...]

Kwargs: TypeAlias = dict[str, Any]

LEAST = 16 * 1024
"""Bytes from which a tensor is deferred; below, running its initialiser costs less than noting it."""


def _packets(names: str) -> set[OpOverloadPacket]:
    return {getattr(torch.ops.aten, name) for name in names.split()}


_aten = torch.ops.aten
_EMPTY = _packets("empty empty_like empty_strided new_empty")
_FILLED = {_aten.zeros: 0.0, _aten.ones: 1.0}
_WHOLE = _packets("normal_ uniform_ fill_ zero_")
"""Fills that do not depend on what was there."""
_IN_PLACE = _WHOLE | _packets(
    "add_ sub_ mul_ div_ pow_ neg_ abs_ sqrt_ exp_ log_ erfinv_ clamp_ clamp_min_ clamp_max_ bernoulli_ exponential_ "
    "log_normal_ cauchy_"
)
_ALIASING = _packets(
    "alias as_strided detach expand permute select slice split split_with_sizes squeeze t transpose unbind unsqueeze "
    "view _unsafe_view"
)
"""Operations that share the memory of their argument and read none of it."""
_RAW = {getattr(Tensor, f"__{name}__") for name in ("array", "deepcopy", "dlpack", "reduce_ex")} | {
    Tensor.data_ptr,
    Tensor.numpy,
    Tensor.share_memory_,
    Tensor.storage,
    Tensor.tolist,
    Tensor.untyped_storage,
}
"""Ways to a tensor's memory that pass by the dispatcher."""


@dataclass(frozen=True)
class _Layout:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        return cls(tensor.dtype, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device="cpu").set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Fill:
    """An in-place operation on (a view of) a deferred tensor, to be run when its values are wanted."""

    func: OpOverload
    where: _Layout
    args: Args = ()
    kwargs: Kwargs = field(default_factory=dict)


@dataclass
class _Waiting:
    """A storage whose values are still to come; it may be dropped by everyone else before they do."""

    storage: StorageWeakRef
    notes: list[_Fill] = field(default_factory=list)

    def fill(self) -> None:
        """Run what was noted, unless nobody holds the storage any more."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is not None:
            with torch.no_grad():
                for note in self.notes:
                    note.func(note.where.on(storage), *note.args, **note.kwargs)


class Deferred(TorchDispatchMode):
    """A dispatch mode in which large tensors get their values as late as possible. One thread, one model."""

    def __init__(self) -> None:
        """Start with nothing deferred."""
        super().__init__()
        self._waiting: dict[int, _Waiting] = {}
        self._seed = torch.initial_seed()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        """Defer, hand on, or compute what the operation needs and run it."""
        packet, kwargs = func.overloadpacket, kwargs or {}
        with torch._C.DisableTorchFunction():
            if packet in _EMPTY:
                return self._emptied(func(*args, **kwargs))
            if packet in _FILLED and func._overloadname == "default" and _is_large(args[0], kwargs):
                out = self._emptied(_aten.empty.memory_format(*args, **kwargs))
                return self._run(_aten.fill_.Scalar, (out, _FILLED[packet]), {})
            return self._run(func, args, kwargs)

    def _run(self, func: OpOverload, args: Args, kwargs: Kwargs) -> object:
        packet = func.overloadpacket
        deferred = [t for t in _tensors((*args, *kwargs.values())) if self._key(t) in self._waiting]
        if not deferred or packet in _ALIASING:
            return func(*args, **kwargs)
        target = args[0]
        if target is deferred[0]:
            if packet in _IN_PLACE and self._can_wait(args[1:], kwargs):
                waiting, note = self._waiting[self._key(target)], _Fill(func, _Layout.of(target), args[1:], kwargs)
                waiting.notes = [note] if packet in _WHOLE and _covers(target) else [*waiting.notes, note]
                return target
            if packet is _aten.copy_ and _covers(target) and self._key(args[1]) != self._key(target):
                self._waiting.pop(self._key(target))  # what was noted is overwritten
        for tensor in deferred:
            self.compute(tensor)
        return func(*args, **kwargs)

    def _emptied(self, out: Tensor) -> Tensor:
        """Defer what is filled into a new tensor, if it is large, of real numbers and in this machine's memory."""
        if type(out) is Tensor and _is_large(
            out.shape, {"dtype": out.dtype, "device": out.device, "layout": out.layout}
        ):
            storage = out.untyped_storage()
            self._waiting[storage._cdata] = _Waiting(StorageWeakRef(storage))
        return out

    def _can_wait(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether an operation gives the same later: no other tensors, no random stream of the model's own."""
        plain = all(v is None or isinstance(v, (bool, int, float)) for v in (*args, *kwargs.values()))
        return plain and torch.initial_seed() == self._seed

    def _key(self, tensor: Tensor) -> int:
        try:
            return tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse, functional … tensors have none
            return 0

    def compute(self, tensor: Tensor) -> None:
        """Give a tensor its values now."""
        waiting = self._waiting.pop(self._key(tensor), None)
        if waiting is not None:
            waiting.fill()

    def finish(self) -> None:
        """Give every tensor that is still deferred, and still in use, its values."""
        while self._waiting:
            self._waiting.pop(next(iter(self._waiting))).fill()


class _RawAccess(TorchFunctionMode):
    """Computes a deferred tensor before something reaches for its memory without the dispatcher."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        if func in _RAW:
            self._deferred.compute(args[0])
        return func(*args, **(kwargs or {}))


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _is_large(size: Sequence[int], how: Kwargs) -> bool:
    """Whether a tensor that is about to be made so is one to defer."""
    dtype, device, layout = how.get("dtype") or torch.get_default_dtype(), how.get("device"), how.get("layout")
    here = torch.device(device or "cpu").type == "cpu" and layout in (None, torch.strided)
    return here and dtype.is_floating_point and math.prod(size) * dtype.itemsize >= LEAST


def _covers(tensor: Tensor) -> bool:
    """Whether a tensor is the whole of its storage, each element once."""
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return dense and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


@contextmanager
def skipped(*, enabled: bool = True) -> Iterator[None]:
    """Within, this thread draws no initial values; at the end only those that nothing has replaced.

    Under a dispatch mode of the caller's own nothing is skipped: it is to see what stock does.
    """
    if not enabled or _get_current_dispatch_mode_stack():
        yield
        return
    deferred = Deferred()
    with _RawAccess(deferred), deferred:
        yield
    deferred.finish()


@contextmanager
def dropped() -> Iterator[Callable[[Tensor], None]]:
    """Within, this thread draws no initial values, and none is drawn at the end: for a model that is to be looked at.

    Yields:
        What gives one tensor its values all the same.
    """
    deferred = Deferred()
    with _RawAccess(deferred), deferred:
        yield deferred.compute
