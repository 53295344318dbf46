"""Damaged, foreign and malicious checkpoints: a CheckpointError that names the tensor, and a model left as it was."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

import timm_resize
from tests.helpers.oracle import redraw_, tensors
from timm_resize import CheckpointError

NAME, ARGS = "vit_tiny_patch16_224", {"depth": 1, "num_classes": 2}


@pytest.fixture(autouse=True)
def _plugin():
    with timm_resize.install():
        yield


def weights(size=96):
    model = timm_resize.create_model(NAME, img_size=size, **ARGS)
    return {k: v.clone() for k, v in redraw_(model).state_dict().items()}


def ways_in(path):
    """Ways to load a file, each as (name, call) on a model that exists or is made."""
    overlay = {"pretrained_cfg_overlay": {"file": str(path), "num_classes": 2}}
    target = timm.create_model(NAME, img_size=160, **ARGS)
    return target, {
        "file": lambda: timm.create_model(NAME, pretrained=True, img_size=160, **overlay, **ARGS),
        "checkpoint_path": lambda: timm.create_model(NAME, checkpoint_path=str(path), img_size=160, **ARGS),
        "load_checkpoint": lambda: timm.models.load_checkpoint(target, str(path)),
    }


def refused(path, text):
    """Every way in raises CheckpointError with `text`; a model that was to be loaded keeps every bit."""
    target, ways = ways_in(path)
    before = {k: v.clone() for k, v in tensors(target).items()}
    for way, call in ways.items():
        with pytest.raises(CheckpointError) as caught:
            call()
        assert text in str(caught.value), f"{way}: {caught.value}"
    assert all(torch.equal(v, before[k]) for k, v in tensors(target).items())


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda s: without(s, "blocks.0.attn.qkv.weight"),
            "VisionTransformer: the checkpoint is of another model: it lacks blocks.0.attn.qkv.weight. Build",
        ),
        (
            lambda s: {**s, "blocks.7.norm1.bias": torch.ones(3)},
            "VisionTransformer: the checkpoint is of another model: the model has no blocks.7.norm1.bias. Build",
        ),
        (lambda s: {**s, "norm.weight": torch.ones(7)}, "norm.weight is (7"),
        (
            lambda s: {**s, "norm.weight": torch.ones(192, dtype=torch.int8)},
            "VisionTransformer: norm.weight is int8, not float32. If the checkpoint is quantised, give the float one",
        ),
        (
            lambda s: {**s, "pos_embed": s["pos_embed"] * float("nan")},
            "VisionTransformer: pos_embed holds values that are not finite",
        ),
        (
            lambda s: {**s, "pos_embed": s["pos_embed"] * float("inf")},
            "VisionTransformer: pos_embed holds values that are not finite",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype", "nan", "inf"],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_does_not_fit_is_named(change, text, suffix, tmp_path):
    """A tensor that is missing, extra, of another shape or type, or not finite."""
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(change(weights()), path)
    refused(path, text)


def test_another_model(tmp_path):
    """The weights of another architecture: its first names are in the error."""
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet18", num_classes=2).state_dict(), path)
    refused(path, "VisionTransformer: the checkpoint is of another model: it")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 4, 20, 1000, -1])
def test_a_truncated_file(suffix, keep, tmp_path):
    """A file cut anywhere: "cannot be read", and the advice to fetch it again."""
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights(), path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "cannot be read")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b'{"pos_embed": {"dtype": "F32", "shape": [1, 37, 192], "data_offsets": [0, 4]}}',
        b'{"pos_embed": {"dtype": "F32", "shape": [99999999999, 99999999999], "data_offsets": [0, 4]}}',
        b'{"pos_embed": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"pos_embed": {"dtype": "F32", "shape": [1], "data_offsets": [1000, 1004]}}',
        b'{"pos_embed": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"pos_embed": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"pos_embed": 3}',
        b"[]",
    ],
)
def test_a_header_that_lies(header, tmp_path):
    """Shapes, types and offsets that do not go together are refused before anything is allocated for them."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refused(path, "cannot be read")


def test_a_header_longer_than_the_file(tmp_path):
    """A length that would take all memory is refused."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(path, "cannot be read")


class Payload:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("wrap", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_code_in_a_pickle_is_never_run(wrap, tmp_path):
    """Pickles are read as weights only."""
    path, mark = tmp_path / "weights.pth", tmp_path / "ran"
    wrap({"state_dict": {**weights(), "evil": Payload(mark)}}, path)
    refused(path, "cannot be read")
    assert not mark.exists()


def saved(folder, **config):
    """A saved model, its config changed."""
    model = timm_resize.create_model(NAME, img_size=96, **ARGS)
    timm_resize.save_pretrained(model, folder)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["model_args"].update(config)
    path.write_text(json.dumps(content))


def test_a_config_that_disagrees_with_the_tensors(tmp_path):
    """Another depth in config.json: the first tensor that is missing is named."""
    saved(tmp_path, depth=2)
    with pytest.raises(CheckpointError, match=r"it lacks blocks\.1\.norm1\.weight and 11 others\. Build"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=160)


def test_a_config_of_another_size_than_the_tensors(tmp_path):
    """The tensors decide where they can: a config that says 224 for a file of 96 gives what 96 gives."""
    saved(tmp_path)
    want = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=160)
    saved(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["model_args"]["img_size"] = [224, 224]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    got = timm.create_model(f"local-dir:{tmp_path / 'other'}", pretrained=True, img_size=160)
    assert all(torch.equal(v, tensors(want)[k]) for k, v in tensors(got).items())


@pytest.mark.parametrize("name", ["../weights", "/etc/passwd", "..\\weights"])
def test_names_with_paths_in_them(name, tmp_path):
    """A tensor named like a path is a tensor that the model has not; nothing is read or written there."""
    path = tmp_path / "in" / "weights.safetensors"
    path.parent.mkdir()
    save_file({**weights(), name: torch.ones(1)}, path)
    before = sorted(tmp_path.rglob("*"))
    refused(path, f"the model has no {name}")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_recorded_size_decides_where_shapes_cannot(tmp_path):
    """A file saved at 112x448 has as many tokens as 224x224: what it records makes it right on every way in."""
    model = redraw_(timm_resize.create_model(NAME, img_size=(112, 448), **ARGS))
    timm_resize.save_pretrained(model, tmp_path)
    want = resample_abs_pos_embed(model.pos_embed, [14, 14], [7, 28], num_prefix_tokens=1)  # stock's own
    path = str(tmp_path / "model.safetensors")
    ours = timm.create_model(NAME, img_size=224, **ARGS)
    timm.models.load_checkpoint(ours, path)
    overlay = {"file": path, "num_classes": 2}
    for got in (
        ours,
        timm.create_model(NAME, img_size=224, checkpoint_path=path, **ARGS),
        timm.create_model(NAME, img_size=224, pretrained=True, pretrained_cfg_overlay=overlay, **ARGS),
        timm.create_model(f"local-dir:{tmp_path}", img_size=224, pretrained=True),
    ):
        torch.testing.assert_close(got.pos_embed, want, atol=1e-5, rtol=0)
        assert not torch.equal(got.pos_embed, model.pos_embed)
