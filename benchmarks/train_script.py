"""timm's own scripts under `timm-resize run`, on images made on the spot, against what is written by hand.

`train.py` trains an epoch at 96, resumes at 128 with EMA and layer decay, and `validate.py` validates at 160. The same
is computed by a loop that knows nothing of this package: stock models, and timm's own resampling of position
embeddings and of their momentum. Losses, accuracies and weights are compared. The other scripts are run once each.

    git clone https://github.com/huggingface/pytorch-image-models
    python benchmarks/train_script.py --timm-repo pytorch-image-models
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, accuracy, random_seed
from torch import Tensor, nn

NAME, KWARGS = "vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}
TRAIN = "--opt momentum --lr 0.05 --sched step --decay-epochs 100 --warmup-epochs 0 --layer-decay 0.7"
TRAIN += " --model-ema --model-ema-decay 0.7 --workers 0 --no-prefetcher -b 8 --log-interval 1"
TRAIN += " --num-classes 2 --device cpu"


def make_images(folder: Path) -> None:
    """Write two classes of noise that differ in a colour: 32 images to train on, 16 to validate on."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for c in range(2):
            (folder / split / f"c{c}").mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 200, (180, 180, 3), dtype=np.uint8)
                pixels[..., c] += 30
                Image.fromarray(pixels).save(folder / split / f"c{c}" / f"c{c}_{i}.png")


class ByHand:
    """The loop that train.py runs, with what changes at another size written out."""

    def __init__(self, images: Path) -> None:
        self.images = images

    def train(self, size: int, epoch: int, resume: dict[str, Any] | None = None) -> dict[str, Any]:
        """Train one epoch and validate the average; return what a checkpoint would hold, and the metrics."""
        random_seed(42, 0)
        model = stock_model(size)
        optimizer = create_optimizer_v2(model, opt="momentum", lr=0.05, weight_decay=2e-5, layer_decay=0.7)
        if resume:
            model.load_state_dict(at_size(resume["model"], size))
            order = [id(p) for group in optimizer.param_groups for p in group["params"]]
            position = order.index(id(model.pos_embed))
            momentum = resume["optimizer"]["state"][position]
            momentum["momentum_buffer"] = resampled(momentum["momentum_buffer"], size)
            optimizer.load_state_dict(resume["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * group["lr_scale"]
        ema = ModelEmaV3(model, decay=0.7)
        if resume:
            ema.module.load_state_dict(at_size(resume["ema"], size))
        loader, criterion = self.loader(model, size, "train"), LabelSmoothingCrossEntropy(0.1)
        loader_eval, losses = self.loader(model, size, "val"), []
        updates = epoch * len(loader)
        model.train()
        optimizer.zero_grad()
        for x, y in loader:
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            updates += 1
            ema.update(model, step=updates)
            optimizer.zero_grad()
            losses.append(loss.item())
        evaluate(model, loader_eval)  # which draws a seed, as train.py does
        metrics = {"train_loss": sum(losses) / len(losses), **evaluate(ema.module, loader_eval)}
        content = {"model": model.state_dict(), "ema": ema.module.state_dict(), "optimizer": optimizer.state_dict()}
        return {**content, "metrics": metrics}

    def validate(self, size: int, weights: dict[str, Tensor]) -> dict[str, float]:
        """Return loss and accuracy of weights of another size."""
        model = stock_model(size)
        model.load_state_dict(at_size(weights, size))
        return evaluate(model, self.loader(model, size, "val"))

    def loader(self, model: nn.Module, size: int, split: str) -> Any:
        """Make the images as the scripts do by default."""
        training = split == "train"
        dataset = create_dataset("", root=str(self.images), split=split, is_training=training, batch_size=8)
        config = resolve_data_config({"img_size": size}, model=model)
        kwargs = {k: config[k] for k in ("input_size", "mean", "std", "crop_pct")}
        if training:
            kwargs.update(is_training=True, color_jitter=0.4, interpolation="random")
        else:
            kwargs.update(interpolation=config["interpolation"])
        device = torch.device("cpu")
        return create_loader(dataset, batch_size=8, num_workers=0, use_prefetcher=False, device=device, **kwargs)


def stock_model(size: int) -> Any:
    """Build the model as stock timm does."""
    return timm.create_model(NAME, img_size=size, num_classes=2, **KWARGS)


def resampled(table: Tensor, size: int) -> Tensor:
    """Resample a table of position embeddings, or its momentum, by timm's own function."""
    old = int((table.shape[1] - 1) ** 0.5)
    return resample_abs_pos_embed(table, [size // 16] * 2, [old] * 2, num_prefix_tokens=1)


def at_size(weights: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Resample the one tensor of a ViT that depends on the size."""
    return {**weights, "pos_embed": resampled(weights["pos_embed"], size)}


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any) -> dict[str, float]:
    """Return mean loss and accuracy."""
    model.eval()
    pairs = [(model(x), y) for x, y in loader]
    output, target = torch.cat([o for o, _ in pairs]), torch.cat([y for _, y in pairs])
    loss = nn.functional.cross_entropy(output, target).item()
    return {"eval_loss": loss, "eval_top1": accuracy(output, target)[0].item()}


class Scripts:
    """timm's scripts, each a process under `timm-resize run`."""

    def __init__(self, repo: Path, folder: Path) -> None:
        self.repo, self.folder, self.images = repo, folder, folder / "images"
        self.model = ["--model", NAME, "--model-kwargs", *(f"{k}={v}" for k, v in KWARGS.items())]

    def run(self, script: str, *arguments: object) -> str:
        """Run one; return all that it printed."""
        command = [sys.executable, "-m", "timm_resize", "run", self.repo / script, *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=self.folder)
        if done.returncode:
            raise SystemExit(f"{script} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return done.stdout + done.stderr

    def train(
        self, name: str, *arguments: object, model: list[str] | None = None
    ) -> tuple[dict[str, Any], list[float]]:
        """Run train.py; return its checkpoint, and the last row of its summary: losses and accuracy."""
        rest = (*TRAIN.split(), "--output", self.folder, "--experiment", name, *(model or self.model))
        self.run("train.py", self.images, *arguments, *rest)
        with open(self.folder / name / "summary.csv") as file:
            row = list(csv.DictReader(file))[-1]
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(self.folder / name / "last.pth.tar", weights_only=True)
        return content, [float(row[k]) for k in ("train_loss", "eval_loss", "eval_top1")]

    def validate(self, *arguments: object) -> tuple[float, float, str]:
        """Run validate.py; return the loss that it prints, the accuracy, and all that it printed."""
        rest = ("--workers", 0, "--no-prefetcher", "-b", 16, "--num-classes", 2, "--device", "cpu", *self.model)
        out = self.run("validate.py", self.images / "val", *arguments, *rest)
        loss = re.findall(r"Loss: +[\d.]+ \( *([\d.]+)\)", out)[-1]
        return float(loss), float(re.findall(r'"top1": ([\d.]+)', out)[-1]), out


def show(
    what: str, script: list[float] | tuple[float, ...], hand: list[float] | tuple[float, ...], atol: float
) -> None:
    """Print both and stop where they differ."""
    print(f"{what:32}", *(f"{a:.6f} {b:.6f}  " for a, b in zip(script, hand, strict=True)))
    assert np.allclose(script, hand, atol=atol), what


def compare_training(scripts: Scripts) -> Path:
    """Run the three steps both ways; return the last checkpoint."""
    hand = ByHand(scripts.images)
    print("script, by hand:                  training loss, EMA's validation loss, its accuracy")
    first = hand.train(96, epoch=0)
    content, found = scripts.train("small", "--img-size", 96, "--epochs", 1)
    show("train.py, an epoch at 96", found, list(first["metrics"].values()), 1e-5)
    path = scripts.folder / "small" / "last.pth.tar"
    second = hand.train(128, epoch=1, resume=first)
    content, found = scripts.train("large", "--img-size", 128, "--epochs", 2, "--resume", path)
    show("train.py, resumed at 128", found, list(second["metrics"].values()), 1e-5)
    far = [
        (content[theirs][k] - v).abs().max().item()
        for theirs, mine in (("state_dict", "model"), ("state_dict_ema", "ema"))
        for k, v in second[mine].items()
    ]
    print(f"largest difference of any weight, EMA's too: {max(far):.1e}")
    assert max(far) < 1e-5
    path = scripts.folder / "large" / "last.pth.tar"
    *found, _ = scripts.validate("--checkpoint", path, "--use-ema", "--img-size", 160)
    show("validate.py at 160", found, list(hand.validate(160, second["ema"]).values()), 1e-4)
    *found, out = scripts.validate("--checkpoint", path, "--use-ema")
    show("validate.py, no size given", found, list(hand.validate(128, second["ema"]).values()), 1e-4)
    assert "is of image size 128x128, and so is the model now" in out
    return path


def run_the_others(scripts: Scripts, checkpoint: Path) -> None:
    """Run each other script at a size that is not the model's own."""
    common = ("--num-classes", 2, "--checkpoint", checkpoint)
    device = ("--device", "cpu")
    results = ("--results-dir", scripts.folder / "inferred", "--results-format", "json")
    scripts.run(
        "inference.py",
        scripts.images / "val",
        "--img-size",
        160,
        "--workers",
        0,
        "-b",
        8,
        *common,
        *device,
        *results,
        *scripts.model,
    )
    rows = json.loads(next((scripts.folder / "inferred").glob("*.json")).read_text())
    print(f"inference.py at 160: {len(rows)} images")
    steps = ("--bench", "inference", "--num-bench-iter", 5, "--num-warm-iter", 1, "-b", 2)
    out = scripts.run("benchmark.py", "--img-size", 96, *steps, *device, "--model", "levit_128s")
    print("benchmark.py, levit_128s:", re.findall(r'"infer_img_size": \d+', out)[0])
    averaged = scripts.folder / "averaged.pth"
    scripts.run("avg_checkpoints.py", "--input", checkpoint.parent, "--output", averaged)
    print("avg_checkpoints.py, then validate.py: loss", scripts.validate("--checkpoint", averaged)[0])
    scripts.train("tuned", "--img-size", 160, "--epochs", 1, "--initial-checkpoint", averaged)
    print("train.py --initial-checkpoint, 128 -> 160")
    small = timm.create_model("levit_128s", num_classes=2)
    torch.save(small.state_dict(), scripts.folder / "levit.pth")
    file = scripts.folder / "levit.onnx"
    levit = ("--model", "levit_128s", "--num-classes", 2, "--checkpoint", scripts.folder / "levit.pth")
    scripts.run("onnx_export.py", file, "--img-size", 160, "--batch-size", 1, "--check-forward", *levit)
    shape = onnx.load(file).graph.input[0].type.tensor_type.shape
    print("onnx_export.py, levit_128s:", [d.dim_value or d.dim_param for d in shape.dim])
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=1)
    timm.models.save_for_hf(teacher, scripts.folder / "teacher")
    kd = ("--kd-model-name", f"local-dir:{scripts.folder / 'teacher'}", "--kd-distill-type", "feature")
    scripts.train("student", "--img-size", 96, "--epochs", 1, *kd)
    scripts.train(
        "student2", "--img-size", 128, "--epochs", 2, *kd, "--resume", scripts.folder / "student/last.pth.tar"
    )
    print("train.py --kd-model-name at 96, resumed at 128")
    sizes = ("--train-img-sizes", 64, 96, 128, "--train-size-schedule", "progressive")
    _, found = scripts.train("sizes", "--img-size", 96, "--epochs", 2, *sizes, model=["--model", "levit_128s"])
    print("train.py --train-img-sizes 64 96 128, levit_128s: training loss", round(found[0], 4))


def main() -> None:
    """Make the images, run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm-repo", type=Path, required=True, help="a clone of timm's repository")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scripts = Scripts(args.timm_repo.resolve(), Path(folder))
        make_images(scripts.images)
        run_the_others(scripts, compare_training(scripts))


if __name__ == "__main__":
    main()
