"""Every Python block of the README and the docs runs, in order, one namespace per file."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
NEEDS = {"programs.md": ("accelerate", "lightning", "open_clip", "peft", "segmentation_models_pytorch", "transformers")}
"""Packages that a page is about; it is skipped where they are not installed."""


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """A page's blocks run as a user would paste them, in an empty folder, and leave timm unpatched."""
    import timm_resize
    from timm_resize.plugin.create_model import fast_init_settings

    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for block in BLOCK.findall(page.read_text()):
                exec(compile(block, str(page), "exec"), names)
        assert len(fast_init_settings) == 0, "the page leaves the plugin installed"
    finally:
        while len(fast_init_settings):
            timm_resize.uninstall()
