"""Save over a checkpoint again and again, each time ended at its next file operation, in a fork."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

from safetensors.torch import load

import timm_resize

EVENTS = {"open", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}
"""Python's audit events of operations that change files or open them."""


def content(folder: Path) -> dict[str, object]:
    """What a reader finds under every name that is no hidden one; of tensors their shapes and a hash of their bytes."""
    found: dict[str, object] = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":  # the order of its metadata is not always the same
            found[path.name] = {k: (v.shape, hash(v.numpy().tobytes())) for k, v in load(path.read_bytes()).items()}
        elif not path.name.startswith("."):
            found[path.name] = path.read_bytes().rpartition(b"<!--")[0 if path.suffix == ".md" else 2]
    return found


def end_at(step: int, how: str, folder: Path) -> list[str]:
    """Kill this process before its `step`-th file operation in the folder, or make that fail; returns those seen."""
    seen: list[str] = []

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event not in EVENTS or not any(str(folder) in str(a) for a in args):
            return
        seen.append(event)
        if len(seen) == step:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")

    sys.addaudithook(hook)
    return seen


def ended_saves(how: str, each: int, base: Path) -> int:
    """End a save over an old checkpoint ("kill" or "fail") at each n-th operation; returns how many ends there were."""
    small = {"depth": 1, "num_classes": 2, "embed_dim": 48, "num_heads": 3, "weight_init": "skip"}  # a fast one
    model = timm_resize.create_model("vit_tiny_patch16_224", **small)
    timm_resize.save_pretrained(model, base / "old" / "new")  # the card has the folder's name
    timm_resize.resize_(model, 96)
    timm_resize.save_pretrained(model, base / "new")
    old, new = content(base / "old" / "new"), content(base / "new")
    outcomes = set()
    for step in itertools.count(1, each):
        folder = base / f"{how}-{step}" / "new"
        shutil.copytree(base / "old" / "new", folder)
        child = os.fork()
        if not child:
            seen = end_at(step, how, folder)
            try:
                timm_resize.save_pretrained(model, folder)
            except OSError:
                os._exit(1)
            os._exit(0 if len(seen) >= step else 2)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = content(folder)
        assert found in (old, new), f"{how} at operation {step}: a mixture, {sorted(found)}"
        assert not (status == 1 and found == new), f"operation {step}: error, yet saved"
        outcomes.add("new" if found == new else "old")
        timm_resize.save_pretrained(model, folder)  # the next save works, and cleans up
        assert {path.name for path in folder.iterdir()} == new.keys(), list(folder.iterdir())
        assert not any(path.is_symlink() for path in folder.iterdir())
        assert content(folder) == new
        shutil.rmtree(folder)
        if status == 2:
            break
    assert outcomes == {"old", "new"}
    return (step - 1) // each
