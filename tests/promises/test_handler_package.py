"""Handlers that another package ships: a wheel with an entry point, installed beside this package."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("setuptools", minversion="70.1", reason="wheels are built with setuptools")

FILES = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "ferry-vit"
version = "1.0"

[project.entry-points."timm_resize.handlers"]
ferry = "ferry.sizes"
""",
    "ferry/__init__.py": '''
"""A model with ferry tokens: one for each window, which carries what its cells say to the other windows."""
import torch
from torch import nn


def home(grid, window, *, device=None, dtype=torch.long):
    """The window of each cell of a grid: (h*w,)."""
    rows, columns = (torch.arange(side, device=device) // window for side in grid)
    return (rows[:, None] * (grid[1] // window) + columns).flatten().to(dtype)


class Ferries(nn.Module):
    def __init__(self, grid, window, dim):
        super().__init__()
        self.grid, self.window = grid, window
        self.tokens = nn.Parameter(torch.randn(1, grid[0] // window * (grid[1] // window), dim))
        self.register_buffer("home", home(grid, window), persistent=False)

    def forward(self, x):
        count = self.tokens.shape[1]
        sums = torch.zeros(len(x), count, x.shape[-1]).index_add(1, self.home, x)
        ferries = self.tokens + sums / self.window**2
        ferries = ferries + torch.softmax(ferries @ ferries.mT, -1) @ ferries
        return x + ferries[:, self.home]


class FerryViT(nn.Module):
    def __init__(self, img_size=(64, 64), dim=8):
        super().__init__()
        self.img_size = img_size
        grid = img_size[0] // 8, img_size[1] // 8
        self.patches = nn.Conv2d(3, dim, 8, 8)
        self.positions = nn.Parameter(torch.randn(1, 1 + grid[0] * grid[1], dim))
        self.first = nn.Parameter(torch.zeros(1, 1, dim))
        self.ferries = Ferries(grid, 4, dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        assert x.shape[-2:] == self.img_size
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(x[:, 0] + self.ferries(x[:, 1:]).mean(1))
''',
    "ferry/sizes.py": '''
"""How its state follows the image size, for timm_resize."""
from timm_resize import Rebuild, register

from ferry import Ferries, FerryViT, home


@register(FerryViT, state="positions (1, 1 + h*w, dim)", size=lambda model: model.img_size)
def plan_ferry_vit(model, ctx):
    """Follow the grid of patches."""
    old, new = (tuple(side // 8 for side in size) for size in (model.img_size, ctx.new_size))
    if any(side % 32 for side in ctx.new_size):
        ctx.invalid("is not made of windows of 32 pixels")
    yield from ctx.parameter(model, "positions", ctx.pos_embed(old, new, prefix=1))
    yield from ctx.attribute(model, img_size=ctx.new_size)
    yield from ctx.visit(model.ferries, grid=new)


@register(Ferries, state="tokens (1, windows, dim), home (h*w,)")
def plan_ferries(ferries, ctx, *, grid):
    """Resample a token a window, and tell each cell its window anew."""
    old, new = (tuple(side // ferries.window for side in g) for g in (ferries.grid, grid))
    yield from ctx.parameter(ferries, "tokens", ctx.pos_embed(old, new))
    yield from ctx.buffer(ferries, "home", (grid[0] * grid[1],), Rebuild(home, (grid, ferries.window)))
    yield from ctx.attribute(ferries, grid=grid)
''',
}

USE = """
import copy, sys
import ferry, torch, timm_resize
from torch import nn
from torch.nn.functional import interpolate

torch.manual_seed(0)
model, size = ferry.FerryViT(), (96, 160)
before, fresh = copy.deepcopy(model), ferry.FerryViT(size)
assert "ferry.sizes" not in sys.modules  # nobody has imported the handlers yet
print(timm_resize.resize_(nn.Sequential(model), size))
tables = {"positions": (1, 8, 12, 20), "ferries.tokens": (0, 2, 3, 5)}
for name, (prefix, side, h, w) in tables.items():
    old, new = before.get_parameter(name), model.get_parameter(name)
    cells = old[:, prefix:].mT.unflatten(2, (side, side))
    want = interpolate(cells, (h, w), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(new[:, prefix:], want, rtol=0, atol=1e-5)
    assert torch.equal(new[:, :prefix], old[:, :prefix])
assert torch.equal(model.ferries.home, fresh.ferries.home) and model.ferries.grid == fresh.ferries.grid == (12, 20)
fresh.load_state_dict(timm_resize.resize_state_dict(before.state_dict(), fresh, source=64))
x = torch.randn(1, 3, *size)
assert torch.equal(model(x), fresh(x)) and torch.equal(timm_resize.MultiSize(before)(x), model(x))
try:
    timm_resize.resize_(model, 100)
except timm_resize.InvalidSizeError as error:
    print(error)
timm_resize.resize_(model, 64)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
"""

SAID = """\
FerryViT: 64x64 -> 96x160
  positions       parameter  1x65x8 -> 1x241x8  resampled: bicubic antialias
  ferries.tokens  parameter  1x4x8 -> 1x15x8    resampled: bicubic antialias
  ferries.home    buffer     64 -> 240          rebuilt
FerryViT: img_size=(100, 100) is not made of windows of 32 pixels. Use 96 or 128.
"""


def run(*command, cwd):
    """Return what a command of a process of its own prints."""
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_package_of_handlers(tmp_path):
    """Built as a wheel and installed into a folder, without a network, it is found when its model is resized."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name, content in FILES.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.lstrip())
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    run("-m", "pip", "wheel", *offline, "--no-build-isolation", "--wheel-dir", "wheels", "./source", cwd=tmp_path)
    [wheel] = (tmp_path / "wheels").glob("ferry_vit-1.0-*.whl")
    run("-m", "pip", "install", *offline, "--target", site, wheel, cwd=tmp_path)
    use = f"import sys; sys.path.insert(0, {str(site)!r})\n{USE}"
    assert run("-c", use, cwd=tmp_path) == SAID
