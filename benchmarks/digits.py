"""Accuracy before and after a resize, on real images: scikit-learn's handwritten digits.

Trains a small model of each family at one size, saves it with timm's own export, opens it at other sizes and
prints the test accuracy: resized with no training, after one short fine-tuning, against drawing the
size-dependent tensors anew and against resizing the images back to the trained size.

    python benchmarks/digits.py                       # all families, 3 seeds
    python benchmarks/digits.py --families vit --seeds 1 --epochs 3
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_digits
from torch import Tensor, nn

import timm_resize

Size = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """A small model: registered name, constructor keywords, training size, and whether windows follow the image."""

    name: str
    size: int = 32
    kwargs: dict[str, Any] = field(default_factory=dict)

    def options(self, size: Size) -> dict[str, Any]:
        """Return the resize options for `size`: windows that keep their share of the image."""
        window = self.kwargs.get("window_size")
        return {"window_size": tuple(window * s // self.size for s in size)} if window else {}

    def sizes(self) -> list[Size]:
        """Return a larger, a smaller and a non-square size."""
        s = self.size
        return [(s * 3 // 2, s * 3 // 2), (s * 3 // 4, s * 3 // 4), (s, s * 3 // 2)]


SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 4, "patch_size": 4}
WINDOWED = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "patch_size": 4, "window_size": 4}
FAMILIES = {
    "vit": Family("vit_tiny_patch16_224", kwargs=SMALL),
    "beit": Family("beit_base_patch16_224", kwargs=SMALL),
    "swin": Family("swin_tiny_patch4_window7_224", kwargs=WINDOWED),
    "swinv2": Family("swinv2_tiny_window8_256", kwargs=WINDOWED),
    "levit": Family(
        "levit_128s",
        size=64,
        kwargs={"embed_dim": (48, 64, 96), "key_dim": 16, "num_heads": (3, 4, 6), "depth": (2, 2, 2)},
    ),
    "mixer": Family("mixer_s32_224", size=128, kwargs={"mlp_ratio": (0.25, 0.5)}),
    "resnet": Family("resnet18", kwargs={"channels": (16, 32, 64, 128)}),
}


class Digits:
    """1797 images of 8x8, in a fixed split of 1297 for training and 500 for testing."""

    def __init__(self) -> None:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        images = torch.as_tensor(data.images, dtype=torch.float32)[order, None] / 8.0 - 1.0  # (1797, 1, 8, 8)
        labels = torch.as_tensor(data.target)[order]
        self.train, self.test = (images[500:], labels[500:]), (images[:500], labels[:500])


def at_size(images: Tensor, size: Size) -> Tensor:
    """Return images (n, 1, h, w) bilinearly resized to `size`."""
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def batches(data: tuple[Tensor, Tensor], size: Size, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches of 64 at `size`, each image moved by up to one of its 8 pixels."""
    images, labels = data
    for index in torch.randperm(len(labels), generator=generator).split(64):
        if len(index) > 1:
            dy, dx = (int(v) for v in torch.randint(-1, 2, (2,), generator=generator))
            moved = F.pad(images[index], (1, 1, 1, 1), value=-1.0)[..., 1 + dy : 9 + dy, 1 + dx : 9 + dx]
            yield at_size(moved, size), labels[index]


def fit(model: nn.Module, data: Digits, size: Size, epochs: int, lr: float, seed: int) -> None:
    """Train with AdamW and a cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * -(-len(data.train[1]) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    model.train()
    for _ in range(epochs):
        for images, labels in batches(data.train, size, generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits(model(images)), labels).backward()
            optimizer.step()
            schedule.step()


def logits(output: Any) -> Tensor:
    """Average the heads of a distilled model."""
    return sum(output) / len(output) if isinstance(output, tuple) else output


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    model.eval()
    hits = sum(
        int((logits(model(i)).argmax(1) == t).sum()) for i, t in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100.0 * hits / len(labels)


def redraw_sized_(model: nn.Module, native: nn.Module, family: Family, size: Size) -> bool:
    """Draw anew the parameters that the resize changed; return whether there were any."""
    options = family.options(size)
    changed = [c.key for c in timm_resize.plan_resize(native, size, **options) if c.kind == "parameter"]
    kwargs = {"num_classes": 10, "in_chans": 1, **family.kwargs, **options}
    fresh = timm_resize.create_model(family.name, img_size=size, **kwargs)
    drawn = dict(fresh.named_parameters())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in changed:
                parameter.copy_(drawn[key])
    return bool(changed)


def run(family: Family, data: Digits, seed: int, epochs: int, tune: int) -> dict[Any, float]:
    """Train one model and measure it at its own and the other sizes."""
    torch.manual_seed(seed)
    native_size = (family.size, family.size)
    kwargs = {"img_size": native_size, **family.kwargs}
    model = timm_resize.create_model(family.name, num_classes=10, in_chans=1, **kwargs)
    fit(model, data, native_size, epochs, 2e-3, seed)
    images, labels = data.test
    out: dict[Any, float] = {"native": accuracy(model, at_size(images, native_size), labels)}
    with tempfile.TemporaryDirectory() as folder:
        timm_resize.save_pretrained(model, folder)
        for size in family.sizes():
            source = f"local-dir:{folder}"
            options = family.options(size)
            resized = timm_resize.create_model(source, pretrained=True, img_size=size, **options)
            other = timm_resize.create_model(source, pretrained=True, img_size=size, **options)
            there = at_size(images, size)
            out[size, "resized"] = accuracy(resized, there, labels)
            out[size, "back"] = accuracy(model, at_size(there, native_size), labels)
            fit(resized, data, size, tune, 3e-4, seed + 1)
            out[size, "resized, tuned"] = accuracy(resized, there, labels)
            if redraw_sized_(other, model, family, size):
                out[size, "redrawn"] = accuracy(other, there, labels)
                fit(other, data, size, tune, 3e-4, seed + 1)
                out[size, "redrawn, tuned"] = accuracy(other, there, labels)
    return out


COLUMNS = ("resized", "resized, tuned", "redrawn", "redrawn, tuned", "back")


def table(families: list[str], results: dict[str, list[dict[Any, float]]]) -> str:
    """Format mean ± standard deviation over the seeds, in percent."""

    def cell(runs: list[dict[Any, float]], key: Any) -> str:
        values = [r[key] for r in runs if key in r]
        if not values:
            return "-"
        return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"

    columns = "resized | resized, tuned | redrawn | redrawn, tuned | images back"
    lines = [
        f"| model | trained at | native | size | {columns} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in families:
        family = FAMILIES[name]
        for size in family.sizes():
            cells = " | ".join(cell(results[name], (size, c)) for c in COLUMNS)
            lines.append(
                f"| {name} | {family.size}x{family.size} | {cell(results[name], 'native')} "
                f"| {size[0]}x{size[1]} | {cells} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60, help="of training at the native size")
    parser.add_argument("--tune", type=int, default=2, help="epochs of fine-tuning after a resize")
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    logging.getLogger("timm").setLevel(logging.ERROR)
    data, start = Digits(), time.time()
    results: dict[str, list[dict[Any, float]]] = {}
    for name in args.families:
        results[name] = [run(FAMILIES[name], data, seed, args.epochs, args.tune) for seed in range(args.seeds)]
        rows = table([name], results).splitlines()[2:]
        print(f"[{time.time() - start:.0f} s]", *rows, sep="\n", flush=True)
    text = table(args.families, results)
    print(f"\ntop-1 in %, mean ± standard deviation over {args.seeds} seeds\n\n{text}")
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
