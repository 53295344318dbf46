"""What a set of replaced files promises beyond its content: modes, and the order in which they reach the disk."""

from __future__ import annotations

import os
import stat
import sys

import pytest

from timm_resize.hub.atomic_files import replace_files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes and folders to sync are POSIX's")


def private(path):
    """Write as safetensors does: a file that only its owner reads."""
    path.write_text("new")
    path.chmod(0o600)


def test_modes_are_those_of_the_umask(tmp_path):
    """Files are for whom the umask says, whatever the function that writes them made of it."""
    before = os.umask(0o027)
    try:
        replace_files(tmp_path, [("a", private), ("b", lambda path: path.write_text("new"))])
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"} == {0o640}


def test_files_are_on_the_disk_before_they_replace_others(tmp_path, monkeypatch):
    """Every new file is synced after its last write and before anything moves; then the folder's entries are."""
    events, sync, replace = [], os.fsync, os.replace

    def synced(handle):
        events.append(("sync", os.fstat(handle).st_ino, os.fstat(handle).st_size))
        sync(handle)

    def moved(old, new):
        events.append(("move",))
        replace(old, new)

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    replace_files(tmp_path, [("a", private), ("b", lambda path: path.write_text("new"))])
    files = [("sync", (tmp_path / name).stat().st_ino, 3) for name in "ab"]
    assert events[:2] == files
    assert events[2] == ("move",)
    assert events[-1][:2] == ("sync", tmp_path.stat().st_ino)
