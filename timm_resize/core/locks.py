"""Locks that a forked child finds free: the thread that held one is not in the child, and would hold it for ever."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType

PATIENCE = 2.0
"""Seconds that a fork waits for another thread to leave a lock, so that the child gets nothing half-written."""


class Lock:
    """A reentrant lock, to be used with `with`."""

    def __init__(self) -> None:
        self.renew()
        _locks.add(self)

    def renew(self) -> None:
        """Be free, whoever held it."""
        self._lock = threading.RLock()

    def acquire(self, timeout: float = -1) -> bool:
        """Take the lock; False where that took longer than `timeout` seconds."""
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()

_forking = threading.local()


def _before_fork() -> None:
    _forking.held = [lock for lock in list(_locks) if lock.acquire(PATIENCE)]


def _in_parent() -> None:
    for lock in _forking.held:
        lock.release()


def _in_child() -> None:
    _in_parent()
    for lock in list(_locks):
        if lock.acquire(0):  # free, or held by the thread that forked, which goes on in the child
            lock.release()
        else:
            lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
