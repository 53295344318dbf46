"""Build a model without computing values that a checkpoint replaces, and read the file straight into its tensors.

While `Deferred` is active in a thread, a large tensor that is allocated empty stays so: in-place fills of it (random
or constant) are noted down, not run. Copying over the whole tensor forgets the notes; reading it in any way runs them
first. At the end whatever nobody replaced (a new head) gets what its own initialisers noted. Tensors of safetensors
files are deferred alike: they are noted as a range of the file, which a copy hands on to the parameter, and all
ranges are read at the end, in parallel, each straight into its place. So every value is stock's; only the order in
which random numbers are drawn is not.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from timm_resize.weights.safetensors_reader import FileTensor, file_tensors, read_all

LEAST = 16 * 1024
"""Bytes from which a tensor is deferred; below, running its initialiser costs less than noting it."""


_aten = torch.ops.aten


_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}


_FILLED = {_aten.zeros: 0.0, _aten.ones: 1.0}


_WHOLE = {_aten.normal_, _aten.uniform_, _aten.fill_, _aten.zero_}
"""Fills that do not depend on what was there."""


_IN_PLACE = _WHOLE | {
    _aten.add_,
    _aten.sub_,
    _aten.mul_,
    _aten.div_,
    _aten.pow_,
    _aten.neg_,
    _aten.abs_,
    _aten.sqrt_,
    _aten.exp_,
    _aten.log_,
    _aten.erfinv_,
    _aten.clamp_,
    _aten.clamp_min_,
    _aten.clamp_max_,
    _aten.bernoulli_,
    _aten.exponential_,
    _aten.log_normal_,
    _aten.cauchy_,
}


_VIEWS = {
    _aten.alias,
    _aten.as_strided,
    _aten.detach,
    _aten.expand,
    _aten.permute,
    _aten.select,
    _aten.slice,
    _aten.split,
    _aten.split_with_sizes,
    _aten.squeeze,
    _aten.t,
    _aten.transpose,
    _aten.unbind,
    _aten.unsqueeze,
    _aten.view,
    _aten._unsafe_view,
}
"""Operations that share the memory of their argument and read none of it."""


_RAW = {
    Tensor.__array__,
    Tensor.__deepcopy__,
    Tensor.__dlpack__,
    Tensor.__reduce_ex__,
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

    func: Any
    where: _Layout
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Read:
    """A tensor of a file, to fill (a view of) a deferred tensor of its shape."""

    source: FileTensor
    where: _Layout

    @property
    def direct(self) -> bool:
        """Whether the bytes of the file are those of the tensor, in that order."""
        source, where = self.source, self.where
        return (source.dtype, source.size, source.stride) == (where.dtype, where.size, where.stride)


@dataclass
class _Waiting:
    """A storage whose values are still to come; it may be dropped by everyone else before they do."""

    storage: StorageWeakRef
    notes: list[_Fill | _Read] = field(default_factory=list)

    def alive(self) -> torch.UntypedStorage | None:
        return torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)


class Deferred(TorchDispatchMode):
    """A dispatch mode in which large tensors get their values as late as possible. One thread, one model."""

    def __init__(self) -> None:
        """Start with nothing deferred."""
        super().__init__()
        self._waiting: dict[int, _Waiting] = {}
        self._files: list[BinaryIO] = []
        self._seed = torch.initial_seed()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Defer, hand on, or compute what the operation needs and run it."""
        packet, kwargs = func.overloadpacket, kwargs or {}
        with torch._C.DisableTorchFunction():
            if packet in _EMPTY:
                return self._emptied(func(*args, **kwargs))
            if packet in _FILLED and func._overloadname == "default" and _is_large(args[0], **kwargs):
                out = self._emptied(_aten.empty.memory_format(*args, **kwargs))
                return self._run(_aten.fill_.Scalar, (out, _FILLED[packet]), {})
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        packet = func.overloadpacket
        deferred = [t for t in _tensors((*args, *kwargs.values())) if self._key(t) in self._waiting]
        if not deferred or packet in _VIEWS:
            return func(*args, **kwargs)
        target = args[0]
        if target is deferred[0]:
            if packet in _IN_PLACE and self._can_wait(args[1:], kwargs):
                waiting, note = self._waiting[self._key(target)], _Fill(func, _Layout.of(target), args[1:], kwargs)
                waiting.notes = [note] if packet in _WHOLE and _covers(target) else [*waiting.notes, note]
                return target
            if packet is _aten.copy_ and _covers(target) and self._copied(target, args[1]):
                return target
        for tensor in deferred:
            self.compute(tensor)
        return func(*args, **kwargs)

    def _emptied(self, out: Tensor) -> Tensor:
        """Defer what is filled into a new tensor, if it is large, of real numbers and in this machine's memory."""
        if type(out) is Tensor and _is_large(out.shape, out.dtype, out.device, out.layout):
            storage = out.untyped_storage()
            self._waiting[storage._cdata] = _Waiting(StorageWeakRef(storage))
        return out

    def _can_wait(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an operation gives the same later: no other tensors, no random stream of the model's own."""
        plain = all(v is None or isinstance(v, (bool, int, float)) for v in (*args, *kwargs.values()))
        return plain and torch.initial_seed() == self._seed

    def _copied(self, target: Tensor, source: Any) -> bool:
        """Let a copy over the whole target replace its notes; return whether the copy itself can wait, too."""
        waiting = self._waiting[self._key(target)]
        known = self._waiting.get(self._key(source)) if isinstance(source, Tensor) else None
        if known is not None and known is not waiting and source.shape == target.shape and source.is_contiguous():
            note = known.notes[0] if len(known.notes) == 1 else None
            if isinstance(note, _Read) and note.direct and source.dtype == note.source.dtype:
                begin = note.source.offset + int(source.storage_offset()) * source.element_size()
                part = FileTensor(note.source.file, begin, tuple(source.shape), source.dtype)
                waiting.notes = [_Read(part, _Layout.of(target))]
                return True
        if known is not waiting:
            if known is not None:
                self.compute(source)
            self._waiting.pop(self._key(target), None)
        return False

    def _key(self, tensor: Tensor) -> int:
        try:
            return tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse, functional … tensors have none
            return 0

    def compute(self, tensor: Tensor) -> None:
        """Give a tensor its values now."""
        waiting = self._waiting.pop(self._key(tensor), None)
        if waiting is not None:
            self._finish([waiting])

    def read(self, path: str) -> dict[str, Tensor] | None:
        """Return the tensors of a safetensors file, the large ones deferred; None for a file with unusual ones."""
        opened = file_tensors(path)
        if opened is None:
            return None
        file, sources = opened
        self._files.append(file)
        with torch._C.DisableTorchFunction():
            return {name: self._noted(source) for name, source in sources.items()}

    def _noted(self, source: FileTensor) -> Tensor:
        """Return a tensor of a file that is read later, or now if it is small."""
        tensor = torch.empty(source.size, dtype=source.dtype, device="cpu")
        waiting = self._waiting.get(self._key(tensor))
        if waiting is not None:
            waiting.notes = [_Read(source, _Layout.of(tensor))]
        elif tensor.numel():
            source.read_into(tensor.untyped_storage())
        return tensor

    def finish(self) -> None:
        """Give every tensor that is still deferred, and still in use, its values."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        try:
            self._finish(waiting)
        finally:
            self.forget()

    def forget(self) -> None:
        """Drop all notes: the model is not going to be used."""
        self._waiting.clear()
        while self._files:
            self._files.pop().close()

    def _finish(self, waiting: list[_Waiting]) -> None:
        kept = [(w.notes, s) for w in waiting if w.notes and (s := w.alive()) is not None]
        read_all([(n.source, s) for notes, s in kept for n in notes[:1] if isinstance(n, _Read) and n.direct])
        with torch.no_grad():
            for notes, storage in kept:
                for note in notes:
                    tensor = note.where.on(storage)
                    if isinstance(note, _Fill):
                        note.func(tensor, *note.args, **note.kwargs)
                    elif not note.direct:  # another dtype or memory format: through a tensor of the file's
                        read = torch.empty(note.source.size, dtype=note.source.dtype, device="cpu")
                        note.source.read_into(read.untyped_storage())
                        tensor.copy_(read)


class _RawAccess(TorchFunctionMode):
    """Computes a deferred tensor before something reaches for its memory without the dispatcher."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RAW:
            self._deferred.compute(args[0])
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _is_large(size: Any, dtype: Any = None, device: Any = None, layout: Any = None, **_: Any) -> bool:
    """Whether a tensor that is about to be made is one to defer."""
    dtype = dtype or torch.get_default_dtype()
    here = torch.device(device or "cpu").type == "cpu" and layout in (None, torch.strided)
    return here and dtype.is_floating_point and math.prod(size) * dtype.itemsize >= LEAST


def _covers(tensor: Tensor) -> bool:
    """Whether a tensor is the whole of its storage, each element once."""
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return dense and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


# -- in use ----------------------------------------------------------------------------------

_local = threading.local()


_stock_load_file = safetensors.torch.load_file


_active = {"threads": 0}


_lock = threading.Lock()


@functools.wraps(_stock_load_file)
def _load_file(filename: Any, device: Any = "cpu", **kwargs: Any) -> Any:
    deferred = getattr(_local, "deferred", None)
    if deferred is not None and str(device) == "cpu" and not kwargs and sys.byteorder == "little":
        out = deferred.read(os.fspath(filename))
        if out is not None:
            return out
    return _stock_load_file(filename, device, **kwargs)


@contextmanager
def active(deferred: Deferred) -> Iterator[None]:
    """Defer in this thread. At the end nothing is computed yet: call `finish`. After an error nothing will be."""
    with _lock:
        _active["threads"] += 1
        safetensors.torch.load_file = _load_file
    outer, _local.deferred = getattr(_local, "deferred", None), deferred
    try:
        with _RawAccess(deferred), deferred:
            yield
    except BaseException:
        deferred.forget()
        raise
    finally:
        _local.deferred = outer
        with _lock:
            _active["threads"] -= 1
            if not _active["threads"]:
                safetensors.torch.load_file = _stock_load_file


def build(
    create_fn: Callable[..., nn.Module], *, loads_after: bool = False, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """Call a model's entry point without initialising what it reads, or what `load_held` will read right after."""
    if not (pretrained or loads_after) or _get_current_dispatch_mode_stack():
        return create_fn(pretrained=pretrained, **kwargs)
    deferred = Deferred()
    with active(deferred):
        model = create_fn(pretrained=pretrained, **kwargs)
    if loads_after and not pretrained:
        _local.held = deferred, weakref.ref(model)
    else:
        deferred.finish()
    return model


def load_held(load: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call `load(model, ...)`; where `build` left the model's initial values out, draw what is missing after it."""
    held, _local.held = getattr(_local, "held", None), None
    if held is None:
        return load(model, *args, **kwargs)
    deferred, built = held
    if built() is not model:  # never by create_model; the other model is complete all the same
        deferred.finish()
    with active(deferred):
        result = load(model, *args, **kwargs)
    deferred.finish()
    return result
