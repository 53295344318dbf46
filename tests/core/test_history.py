"""What is recorded of a checkpoint's way: in the file, on the model, in the card."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import timm
import torch
from safetensors import safe_open

import timm_resize
from tests.helpers.oracle import redraw_, stock

RANDOM = {"checkpoint": None, "img_size": None}
"""How the history of a model begins whose weights this package did not load."""
METHOD = {"pos_embed": "resampled: bicubic antialias"}


def recorded(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    return json.loads(metadata["timm_resize"])


def train_(model):
    with torch.no_grad():
        model.pos_embed += 1


def test_each_hop_is_recorded(tmp_path):
    """224 → 96, saved; opened at 128, trained, → 160, saved: every event, in order, and the versions."""
    first = stock("vit_tiny_patch16_224", depth=1)
    timm_resize.resize_(first, 96)
    timm_resize.save_pretrained(first, tmp_path / "first")
    events = [RANDOM, {"resized": [[224, 224], [96, 96]], "methods": METHOD}]
    assert recorded(tmp_path / "first")["history"] == events
    second = timm_resize.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True, img_size=128)
    train_(second)
    timm_resize.resize_(second, 160)
    timm_resize.save_pretrained(second, tmp_path / "second")
    record = recorded(tmp_path / "second")
    assert record["history"] == [
        *events,
        {"checkpoint": "first", "img_size": [96, 96]},
        {"resized": [[96, 96], [128, 128]], "methods": METHOD},
        {"trained": ["pos_embed"]},
        {"resized": [[128, 128], [160, 160]], "methods": METHOD},
    ]
    assert (record["architecture"], record["img_size"]) == ("vit_tiny_patch16_224", [160, 160])
    assert record["versions"] == {
        "timm_resize": timm_resize.__version__,
        "timm": timm.__version__,
        "torch": str(torch.__version__),
    }
    card = (tmp_path / "second" / "README.md").read_text()
    unknown = "random initialisation, or weights that were loaded by something else"
    assert f"- checkpoint: {unknown}\n- resized from 224x224 to 96x96: `pos_embed` resampled: bicubic" in card


def test_a_chain_that_nobody_touched_is_one_event(tmp_path):
    """224 → 384 → 256 untouched starts from the original, so it is 224 → 256; back at 224 nothing has happened."""
    model = stock("vit_tiny_patch16_224", depth=1)
    timm_resize.resize_(model, 384)
    timm_resize.resize_(model, 256)
    timm_resize.save_pretrained(model, tmp_path)
    assert recorded(tmp_path)["history"][1:] == [{"resized": [[224, 224], [256, 256]], "methods": METHOD}]
    timm_resize.resize_(model, 224)
    timm_resize.save_pretrained(model, tmp_path)
    assert recorded(tmp_path)["history"] == [RANDOM]


def test_training_after_the_last_resize_is_recorded(tmp_path):
    """A file tells whether its resampled tensors are those of the resize."""
    model = stock("vit_tiny_patch16_224", depth=1)
    timm_resize.resize_(model, 96)
    train_(model)
    timm_resize.save_pretrained(model, tmp_path)
    assert recorded(tmp_path)["history"][-1] == {"trained": ["pos_embed"]}


@pytest.mark.parametrize("way", ["checkpoint_path", "file"])
def test_files_that_are_loaded_start_a_history(way, tmp_path):
    """A recorded file goes on with its own history under its name, not its place on the disk."""
    timm_resize.save_pretrained(stock("vit_tiny_patch16_224", depth=1), tmp_path)
    path = str(tmp_path / "model.safetensors")
    how = (
        {"checkpoint_path": path}
        if way == "checkpoint_path"
        else {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}
    )
    model = timm_resize.create_model("vit_tiny_patch16_224", depth=1, img_size=96, **how)
    timm_resize.save_pretrained(model, tmp_path / "next")
    assert recorded(tmp_path / "next")["history"] == [
        RANDOM,
        {"checkpoint": "model.safetensors", "img_size": [224, 224]},
        {"resized": [[224, 224], [96, 96]], "methods": METHOD},
    ]
    assert str(tmp_path) not in (tmp_path / "next" / "README.md").read_text()


def test_copies_and_pickles_keep_it():
    """The history follows a model as its weights do."""
    model = stock("vit_tiny_patch16_224", depth=1)
    timm_resize.resize_(model, 96)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert duplicate._resize_history == model._resize_history != ()


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"timm_resize": "no json"},
        {"timm_resize": "[1]"},
        {"timm_resize": '{"img_size": [1], "history": 3}'},
        {"timm_resize": '{"img_size": ["a", -1], "history": [3]}'},
        {"timm_resize": '{"img_size": [96, 96], "history": [{"resized": 3}]}'},
        {"timm_resize": '{"img_size": [96, 96], "history": [{"resized": [[1, 2], [3]], "methods": {}}]}'},
        {"timm_resize": '{"img_size": [96, 96], "history": [{"checkpoint": ["x"], "img_size": null}]}'},
        {"timm_resize": '{"img_size": [96, 96], "history": [{"trained": [1]}]}'},
        {"timm_resize": '{"img_size": [96, 96], "history": [' + '{"trained": []},' * 1000 + '{"trained": []}]}'},
        {"timm_resize": "[" * 100_000},
    ],
)
def test_files_without_a_record_or_with_nonsense_load(metadata, tmp_path):
    """Metadata is a record, never a condition."""
    from safetensors.torch import save_file

    model = stock("vit_tiny_patch16_224", depth=1)
    save_file(model.state_dict(), tmp_path / "weights.safetensors", metadata=metadata)
    path = str(tmp_path / "weights.safetensors")
    ours = timm_resize.create_model("vit_tiny_patch16_224", depth=1, img_size=96, checkpoint_path=path)
    theirs = stock("vit_tiny_patch16_224", depth=1, img_size=224, checkpoint_path=path)
    theirs.set_input_size((96, 96))
    torch.testing.assert_close(ours.pos_embed, theirs.pos_embed, atol=1e-5, rtol=0)
    timm_resize.save_pretrained(ours, tmp_path / "again")


def test_a_model_made_real_after_a_resize_on_the_meta_device():
    """What it was filled with is the start of its next resize: there is nothing that it was before."""
    kwargs = {"depth": 1, "embed_dim": 24, "num_heads": 1}
    model = stock("vit_tiny_patch16_224", img_size=64, device="meta", **kwargs)
    timm_resize.resize_(model, 96)
    model.to_empty(device="cpu")
    loaded = redraw_(stock("vit_tiny_patch16_224", img_size=96, **kwargs))
    model.load_state_dict(loaded.state_dict())
    for one in (model, loaded):
        timm_resize.resize_(one, 64)
    assert torch.equal(model.pos_embed, loaded.pos_embed)
