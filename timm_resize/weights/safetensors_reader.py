"""Tensors of a safetensors file, read straight into memory that is already theirs."""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

CHUNK = 16 * 1024 * 1024
"""Bytes that one thread reads at a time."""


HUGE_PAGE = 2 * 1024 * 1024


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class FileTensor:
    """A contiguous tensor that starts at byte `offset` of an open file."""

    file: BinaryIO
    offset: int
    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, in the file and in memory."""
        return math.prod(self.size) * self.dtype.itemsize

    @property
    def stride(self) -> tuple[int, ...]:
        """Strides in elements, as torch counts them."""
        return tuple(math.prod(max(n, 1) for n in self.size[i + 1 :]) for i in range(len(self.size)))

    def read_into(self, storage: torch.UntypedStorage) -> None:
        """Fill a storage of its size."""
        _read_into(self.file, self.offset, _memory(storage)[: self.nbytes])


def file_tensors(path: str) -> tuple[BinaryIO, dict[str, FileTensor]] | None:
    """Open a safetensors file and list its tensors; None when it holds types that are not listed here.

    The file stays open, so that one which is replaced meanwhile can still be read. Close it.

    Raises:
        SafetensorError: The file is damaged, as `safetensors.safe_open` finds it.

    Source: the safetensors format: 8 bytes length of the header, little-endian; the header, JSON; the tensors.
    """
    with safe_open(path, framework="pt") as checked:
        names = list(checked.keys())
    file = open(path, "rb", buffering=0)  # noqa: SIM115
    length = bytearray(8)
    _read_into(file, 0, memoryview(length))
    header = bytearray(int.from_bytes(length, "little"))
    _read_into(file, 8, memoryview(header))
    entries = json.loads(header)
    if any(entries[n]["dtype"] not in _DTYPES for n in names):
        file.close()
        return None
    start = 8 + len(header)
    return file, {
        n: FileTensor(file, start + e["data_offsets"][0], tuple(e["shape"]), _DTYPES[e["dtype"]])
        for n, e in ((n, entries[n]) for n in names)
    }


def read_all(reads: Sequence[tuple[FileTensor, torch.UntypedStorage]]) -> None:
    """Read tensors into storages of their size, with as many threads as torch uses, in the order of the file."""
    pieces = []
    for source, storage in sorted(reads, key=lambda r: r[0].offset):
        memory = _memory(storage)[: source.nbytes]
        _ask_for_huge_pages(storage)
        pieces += [(source.file, source.offset + i, memory[i : i + CHUNK]) for i in range(0, len(memory), CHUNK)]
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        for piece in pieces:
            _read_into(*piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_read_into, *piece) for piece in pieces]:
            done.result()


_seek = threading.Lock()


def _read_into(file: BinaryIO, offset: int, memory: memoryview) -> None:
    """Fill `memory` from a file, whatever other threads read from it."""
    done = 0
    while done < len(memory):
        piece = memory[done : done + CHUNK]
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [piece], offset + done)
        else:
            with _seek:
                file.seek(offset + done)
                count = file.readinto(piece)  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{file.name}: ends at byte {offset + done}, before the tensors that its header lists.")
        done += count


def _memory(storage: torch.UntypedStorage) -> memoryview:
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


@functools.cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, AttributeError):
        function = ctypes.CDLL(None).madvise
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        return function
    return None


def _ask_for_huge_pages(storage: torch.UntypedStorage) -> None:
    """Let the kernel back fresh memory by 2 MiB pages, where it may: writing to it first costs half then."""
    advise, begin = _madvise(), -(-storage.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (storage.data_ptr() + storage.nbytes()) // HUGE_PAGE * HUGE_PAGE
    if advise is not None and end > begin:
        advise(begin, end - begin, 14)  # MADV_HUGEPAGE; a kernel without it refuses, which changes nothing
