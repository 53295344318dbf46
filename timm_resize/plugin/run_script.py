"""Run somebody else's script with the plugin in."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from timm_resize.plugin.install import install
from timm_resize.plugin.script_sizes import sized_as


def run_script(path: str, arguments: Sequence[str], *, module: bool = False) -> None:
    """Run a script, or a module, as Python would, with the plugin in.

    Args:
        path: The script, or the module's name.
        arguments: Its command line.
        module: `path` is a module, as for `python -m`.

    Raises:
        SystemExit: What the script exits with; 1 after an exception, whose traceback starts in the script.
    """
    place = os.getcwd() if module else os.path.dirname(os.path.realpath(path))
    with _as_main([path, *arguments], place), install(), sized_as(arguments):
        try:
            if module:
                runpy.run_module(path, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(path, run_name="__main__")
        except Exception as error:
            _report(error)
            raise SystemExit(1) from None


@contextmanager
def _as_main(argv: list[str], place: str) -> Iterator[None]:
    """Set `sys.argv` and the first of `sys.path` as Python does for the script that it is given."""
    before = sys.argv, sys.path
    sys.argv = argv
    if not getattr(sys.flags, "safe_path", False):
        sys.path = [place, *sys.path[1:]]
    try:
        yield
    finally:
        sys.argv, sys.path = before


def _report(error: Exception) -> None:
    """Print a traceback as Python does, without the frames that led to the script."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
