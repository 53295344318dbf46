"""Opens what was saved as a user without this package does, in a fork after `without_the_package`, or as a program.

Usage: python -m tests.helpers.stock_reader FOLDER... Imports nothing of timm_resize: that fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch


def read(folder: Path, source: str = "", **kwargs: object) -> None:
    """Open `source` (the folder), run it on the folder's image.pt, and write what was seen to its seen.pt."""
    assert sys.modules["timm_resize"] is None
    model = timm.create_model(source or f"local-dir:{folder}", pretrained=True, **kwargs).eval()
    with torch.no_grad():
        output = model(torch.load(folder / "image.pt"))
    size = timm.data.resolve_model_data_config(model)["input_size"]
    torch.save({"state": model.state_dict(), "output": output, "input_size": tuple(size)}, folder / "seen.pt")


if __name__ == "__main__":
    sys.modules["timm_resize"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)  # as the tests: the order of sums depends on it
    for argument in sys.argv[1:]:
        read(Path(argument))
