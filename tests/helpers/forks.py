"""Other processes that need no start of their own: forks of this one, in which everything is imported."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType

import pytest


def in_forks(*works: Callable[[], object]) -> list[object]:
    """Run each in a process of its own, all at once; returns what each returned, and fails with what one raised."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    context = multiprocessing.get_context("fork")

    def run(work: Callable[[], object], pipe: Connection) -> None:
        try:
            pipe.send(("returned", work()))
        except BaseException:
            pipe.send(("raised", traceback.format_exc()))

    pipes, processes = [], []
    for work in works:
        ours, theirs = context.Pipe()
        pipes.append(ours)
        processes.append(context.Process(target=run, args=(work, theirs)))
        processes[-1].start()
        theirs.close()  # so that a process that dies is an end of file
    outcomes = [pipe.recv() for pipe in pipes if pipe.poll(240)]
    for process in processes:
        process.join(10)
        process.kill()
    assert len(outcomes) == len(works), "a process hangs"
    assert [content for how, content in outcomes if how == "raised"] == []
    return [content for _, content in outcomes]


def forget_the_package() -> None:
    """Make this process, a fork, one that has not imported the package yet."""
    for name in [name for name in sys.modules if name.split(".")[0] == "timm_resize"]:
        del sys.modules[name]


def without_the_package() -> None:
    """Make this process, a fork, one of a user without the package: importing it fails."""
    forget_the_package()
    missing: dict[str, ModuleType | None] = {"timm_resize": None}
    sys.modules.update(missing)  # type: ignore[arg-type]
