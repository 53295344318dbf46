"""Several files of a folder, replaced as one: whenever the process dies, all are the old ones or all the new."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STAGE = ".timm_resize-"
"""Prefix of the folder that holds old and new files while they are exchanged."""


def replace_files(folder: Path, files: Sequence[tuple[str, Callable[[Path], Any]]]) -> None:
    """Write files of `folder`, made when missing, so that no crash leaves a mixture of old and new.

    The new files are written in full first. All become symbolic links through one link to the old set; renaming that
    one link to the new set is the moment at which all change; then they become ordinary files again. Where the
    file system knows no symbolic links they are renamed one after the other, in the order given.

    Args:
        folder: Other files in it stay.
        files: Names, each with the function that writes its content to a path.

    Raises:
        OSError: What the file system refused; the folder is as it was.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(folder) as alone:
            stage = folder / f"{STAGE}{uuid.uuid4().hex[:8]}"
            try:
                (stage / "new").mkdir(parents=True)
                _exchange(_Exchange(folder, stage, files))
            finally:
                with suppress(OSError):  # the next call tries again
                    _clear(folder, f"{STAGE}*" if alone else stage.name)
    except BaseException:
        if made:
            with suppress(OSError):  # not empty: somebody else's files
                folder.rmdir()
        raise


class _Exchange:
    """One set of files on its way into a folder."""

    def __init__(self, folder: Path, stage: Path, files: Sequence[tuple[str, Callable[[Path], Any]]]) -> None:
        self.folder, self.stage, self.files = folder, stage, files
        self.names = [name for name, _ in files]
        self.links = {n: os.readlink(folder / n) for n in self.names if (folder / n).is_symlink()}

    def write(self) -> None:
        """Write the new files in full, and keep the old ones at hand."""
        for name, write in self.files:
            path = self.stage / "new" / name
            path.touch()
            mode = path.stat().st_mode
            write(path)
            path.chmod(mode)  # safetensors makes files that only their owner reads
            _sync(path)
        (self.stage / "old").mkdir()
        for name in self.names:
            target, kept = self.folder / name, self.stage / "old" / name
            if name in self.links:
                os.symlink(os.path.realpath(target), kept)
            elif target.exists():
                _copy(target, kept)

    def links_work(self) -> bool:
        """Prepare the links; return False where the system has none."""
        try:
            os.symlink("old", self.stage / "now")
            os.symlink("new", self.stage / "next")
            for name in self.names:
                os.symlink(Path(self.stage.name, "now", name), self.stage / name)
        except (OSError, NotImplementedError):
            return False
        return True

    def restore(self) -> None:
        """Put back what was there."""
        for name in self.names:
            target, kept = self.folder / name, self.stage / "old" / name
            if name in self.links:
                kept.unlink()
                os.symlink(self.links[name], kept)
            if os.path.lexists(kept):
                os.replace(kept, target)
            elif os.path.lexists(target):
                target.unlink()


def _exchange(it: _Exchange) -> None:
    it.write()
    linked = it.links_work()
    try:
        if linked:
            for name in it.names:
                os.replace(it.stage / name, it.folder / name)
            os.replace(it.stage / "next", it.stage / "now")  # the moment
        else:
            for name in it.names:
                os.replace(it.stage / "new" / name, it.folder / name)
    except BaseException:
        it.restore()
        raise
    if linked:
        for name in it.names:
            with suppress(OSError):  # still a link then, to a stage that stays for it
                os.replace(it.stage / "new" / name, it.folder / name)
    with suppress(OSError):  # some file systems, and Windows, sync no folders
        _sync(it.folder)


def _clear(folder: Path, pattern: str) -> None:
    """Remove stages, also of processes that died, that no link leads into."""
    used = {Path(os.readlink(path)).parts[0] for path in folder.iterdir() if path.is_symlink()}
    for stage in folder.glob(pattern):
        if stage.name not in used:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Wait until nobody else replaces files of the folder; yields False where the system cannot tell."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        locked = False
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        yield locked
    finally:
        os.close(handle)


def _copy(target: Path, to: Path) -> None:
    try:
        os.link(target, to)
    except OSError:  # a file system without hard links
        shutil.copy2(target, to)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
