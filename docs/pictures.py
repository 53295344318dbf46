"""Draw the pictures of the documentation, light and dark, from real tensors.

python docs/pictures.py --data DIR    as for benchmarks/fidelity.py, whose results it draws

Positions and patch kernels are those of DINOv2 ViT-S/14.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import timm_resize
from benchmarks import fidelity
from timm_resize.resample import patch_kernel, pos_embed, rel_pos_table

HERE = Path(__file__).parent / "pictures"
THEMES = {"light": ("#1f2328", "#ffffff"), "dark": ("#e6edf3", "#1e2129")}
ONE, TWO, GREY = "#3f7fbf", "#d9822b", "#8a8f98"

Drawing = Callable[[], Figure]


@contextmanager
def theme(name: str) -> Iterator[None]:
    ink, paper = THEMES[name]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    with mpl.rc_context({**colours, "figure.facecolor": paper, "axes.facecolor": paper, "font.size": 11}):
        yield


def panels(count: int, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(2.5 * count, height), layout="constrained")
    return figure, list(axes)


def shown(axis: Axes, values: Tensor, title: str, **kwargs: object) -> None:
    axis.imshow(values.detach().numpy(), **kwargs)
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])


def likeness(table: Tensor, grid: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """Return the cosine of a cell's position embedding to that of every cell: (h, w)."""
    rows = nn.functional.normalize(table[0, 1:], dim=-1)
    return (rows @ rows[cell[0] * grid[1] + cell[1]]).reshape(grid)


def positions(table: Tensor) -> Drawing:
    """The likeness of one cell to all, before and after."""

    def draw() -> Figure:
        figure, axes = panels(3)
        for axis, (grid, cell) in zip(
            axes, (((37, 37), (18, 18)), ((16, 16), (8, 8)), ((23, 32), (11, 16))), strict=True
        ):
            new = pos_embed((37, 37), grid, prefix=1)(table)
            name = "trained" if grid == (37, 37) else "resized"
            shown(axis, likeness(new, grid, cell), f"{name}: {grid[0]} x {grid[1]}", vmin=0, vmax=1, cmap="viridis")
        return figure

    return draw


def square_guess(table: Tensor) -> Drawing:
    """A wide table read as the square one of as many rows."""

    def draw() -> Figure:
        wide = pos_embed((37, 37), (12, 48), prefix=1)(table)
        guessed = pos_embed((24, 24), (12, 48), prefix=1)(wide)
        figure, axes = panels(2, 1.5)
        for axis, values, title in zip(
            axes, (wide, guessed), ("its own grid, 12 x 48", "a square root: 24 x 24"), strict=True
        ):
            shown(axis, likeness(values, (12, 48), (6, 24)), title, vmin=0, vmax=1, cmap="viridis")
        return figure

    return draw


def kernels(weight: Tensor) -> Drawing:
    """A patch kernel, made smaller in both ways."""

    def draw() -> Figure:
        figure, axes = panels(3)
        which = int(weight.flatten(1).std(1).argmax())
        for axis, (title, kernel) in zip(
            axes,
            (
                ("trained, 14 px", weight),
                ("pinv, 8 px", patch_kernel((14, 14), (8, 8))(weight)),
                ("adjoint, 8 px", patch_kernel((14, 14), (8, 8), adjoint=True)(weight)),
            ),
            strict=True,
        ):
            image = kernel[which].mean(0)
            shown(axis, image / image.abs().max(), title, vmin=-1, vmax=1, cmap="RdBu")
        return figure

    return draw


def bias_table() -> Figure:
    """A table of relative positions whose rows are spaced evenly, and one whose near rows are closer, as ours."""
    old = torch.exp(-(torch.arange(-6, 7.0)[:, None].abs() + torch.arange(-6, 7.0).abs()) / 1.5).reshape(-1, 1)
    figure, axes = panels(3)
    shown(axes[0], old.reshape(13, 13), "window 7", vmin=0, vmax=1, cmap="viridis")
    for axis, mode, title in (
        (axes[1], "geometric", "window 12, geometric"),
        (axes[2], "bicubic", "window 12, bicubic"),
    ):
        new = rel_pos_table((7, 7), (12, 12), mode=mode)(old)
        shown(axis, new.reshape(23, 23), title, vmin=0, vmax=1, cmap="viridis")
    return figure


def shift_mask() -> Figure:
    """Windows of a Swin at two sizes, and what its shifted windows may not see."""
    figure, axes = panels(3)
    for axis, size in ((axes[0], (224, 224)), (axes[1], (160, 288))):
        model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 1, 1, 1))
        timm_resize.resize_(model, size)
        block = model.layers[0].blocks[1]
        (h, w), (a, b) = block.input_resolution, block.window_size
        tiles = (torch.arange(h)[:, None] // a + torch.arange(w) // b) % 2
        shown(axis, tiles, f"{size[0]} x {size[1]}: windows {a} x {b}", cmap="Greys", vmin=-1, vmax=2)
    shown(axes[2], block.attn_mask[-1], "mask of the last window", cmap="Greys")
    return figure


def curve(found: dict[str, Tensor]) -> Drawing:
    """Likeness to the features at 224 px, where the patch changes with the image."""

    def draw() -> Figure:
        figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
        for how, colour in (("pinv", TWO), ("adjoint", ONE)):
            points = [(size, found[f"patch {patch}, {size} px, {how}"]) for size, patch in fidelity.PATCHES]
            mean = [float(values.mean()) for _, values in points]
            axis.plot([size for size, _ in points], mean, marker="o", color=colour, label=how)
        axis.set_xlabel("image size in pixels; the grid stays 16 x 16")
        axis.set_ylabel("cosine to 224 px")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        return figure

    return draw


def plan_then_apply() -> Figure:
    """Four boxes: what is read, what is planned, what is computed, what is written."""
    figure, axis = plt.subplots(figsize=(7, 1.6), layout="constrained")
    steps = (
        ("model", "read only"),
        ("plan", "shapes, on meta"),
        ("new values", "beside the model"),
        ("write", "all or nothing"),
    )
    for i, (title, below) in enumerate(steps):
        axis.text(
            i,
            0.62,
            title,
            ha="center",
            va="center",
            fontsize=12,
            bbox={"boxstyle": "round,pad=0.5", "fc": "none", "ec": ONE},
        )
        axis.text(i, 0.2, below, ha="center", va="center", fontsize=9, color=GREY)
        if i:
            axis.annotate("", (i - 0.36, 0.62), (i - 0.64, 0.62), arrowprops={"arrowstyle": "->", "color": GREY})
    axis.set_xlim(-0.5, 3.5)
    axis.set_ylim(0, 1)
    axis.axis("off")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("fidelity_data"))
    parser.add_argument("--results", type=Path, default=Path(fidelity.__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    model = fidelity.dinov2(args.data)
    table, weight = model.pos_embed.detach(), model.patch_embed.proj.weight.detach()
    drawings: dict[str, Drawing] = {
        "positions": positions(table),
        "square_guess": square_guess(table),
        "patch_kernels": kernels(weight),
        "bias_table": bias_table,
        "windows": shift_mask,
        "patch_curve": curve(fidelity.read(args.results)),
        "plan_then_apply": plan_then_apply,
    }
    HERE.mkdir(exist_ok=True)
    for name, draw in drawings.items():
        for shade in THEMES:
            with theme(shade):
                figure = draw()
                figure.savefig(HERE / f"{name}_{shade}.png", dpi=130)
                plt.close(figure)


if __name__ == "__main__":
    main()
