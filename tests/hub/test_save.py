"""Saved models open in stock timm, in a process without this package; a failing save leaves the old files whole."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.utils import prune

import timm_resize
from tests.helpers.examples import EXAMPLES
from tests.helpers.forks import in_forks, without_the_package
from tests.helpers.killed_saves import ended_saves
from tests.helpers.oracle import image, redraw_, stock
from tests.helpers.stock_reader import read
from timm_resize.hub import save as hub
from timm_resize.hub.save import plain_tensors, save_pretrained, stock_misfit

MODELS = {
    "vit_tiny_patch16_224": ({}, (96, 160)),
    "deit_tiny_distilled_patch16_224": ({"num_classes": 3}, (192, 192)),
    "levit_128s": ({"num_classes": 5}, (160, 256)),
    "swin_tiny_patch4_window7_224": ({"in_chans": 1}, (192, 256)),
    "resmlp_12_224": ({"num_classes": 2}, (128, 192)),
    "coat_lite_tiny": ({}, (192, 128)),
    "resnet18": ({"num_classes": 2}, (192, 128)),
}


def picture(model, size):
    channels = model.pretrained_cfg["input_size"][0] if not hasattr(model, "in_chans") else model.in_chans
    return image(size)[:, :channels]


@pytest.fixture(scope="module", params=["fork", pytest.param("process", marks=pytest.mark.slow)])
def read_back(request, tmp_path_factory):
    """Resize, save, and read every model in one process without timm_resize; name → (model, folder, seen)."""
    saved = {}
    for name, (kwargs, size) in MODELS.items():
        model = redraw_(stock(name, **EXAMPLES[name], **kwargs))
        timm_resize.resize_(model, size)
        folder = tmp_path_factory.mktemp(name)
        save_pretrained(model, folder)
        torch.save(picture(model, size), folder / "image.pt")
        saved[name] = (model, folder)
    folders = [folder for _, folder in saved.values()]

    def user():
        without_the_package()
        for folder in folders:
            read(folder)

    if request.param == "fork":
        in_forks(user)
    else:
        command = [sys.executable, "-m", "tests.helpers.stock_reader", *folders]
        run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    return {name: (model, folder, torch.load(folder / "seen.pt")) for name, (model, folder) in saved.items()}


@pytest.mark.parametrize("name", MODELS)
def test_opens_in_stock_timm(name, read_back):
    """Stock timm without this package reads equal bits, computes equal outputs, and knows the input size."""
    model, folder, seen = read_back[name]
    state = model.state_dict()
    assert seen["state"].keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(seen["state"][key], value), key
    x = torch.load(folder / "image.pt")
    with torch.no_grad():
        assert torch.equal(seen["output"], model(x))
    assert seen["input_size"] == tuple(x.shape[1:])
    assert stock_misfit(folder) is None


def config_of(model, folder):
    save_pretrained(model, folder)
    return json.loads((folder / "config.json").read_text())


def test_config_of_a_fixed_size(tmp_path):
    """A class whose constructor takes img_size is rebuilt by it."""
    model = stock("vit_tiny_patch16_224", depth=1)
    timm_resize.resize_(model, (96, 160))
    config = config_of(model, tmp_path)
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"]["img_size"] == [96, 160]
    assert config["model_args"]["depth"] == 1
    assert config["pretrained_cfg"]["input_size"] == [3, 96, 160]


def test_config_of_a_size_free_model(tmp_path):
    """A class without img_size gets none; preprocessing has the new size, the source's test size is gone."""
    model = stock("resnet18.a1_in1k", num_classes=2)
    timm_resize.resize_(model, (256, 320))
    config = config_of(model, tmp_path)
    assert "img_size" not in config["model_args"]
    data = config["pretrained_cfg"]
    assert data["input_size"] == [3, 256, 320]
    assert data["pool_size"] is None
    assert "test_input_size" not in data
    assert data["crop_pct"] == 0.95
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert timm.data.resolve_model_data_config(again, use_test_size=True)["input_size"] == (3, 256, 320)


def test_config_of_an_unchanged_model(tmp_path):
    """Without a resize the file is timm's own, the source's test size included."""
    from timm.models._hub import save_config_for_hf

    model = stock("resnet18.a1_in1k")
    save_config_for_hf(model, str(tmp_path / "stock.json"))
    config = config_of(model, tmp_path / "ours")
    want = json.loads((tmp_path / "stock.json").read_text())
    want["model_args"].pop("num_classes")  # stands beside it
    assert config == want
    assert config["pretrained_cfg"]["test_input_size"] == [3, 288, 288]


def test_shared_and_strided_tensors(tmp_path):
    """Tied, transposed and channels-last weights are written, each under its name; the model keeps them as they are."""
    model = redraw_(stock("vit_tiny_patch16_224", depth=2, num_classes=2)).to(memory_format=torch.channels_last)
    model.blocks[1].attn.proj.weight = model.blocks[0].attn.proj.weight
    model.head.weight = nn.Parameter(torch.randn(192, 2).t())
    strides = {k: v.stride() for k, v in model.state_dict().items()}
    save_pretrained(model, tmp_path)
    state = model.state_dict()
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())
    assert {k: v.stride() for k, v in state.items()} == strides
    assert model.blocks[1].attn.proj.weight is model.blocks[0].attn.proj.weight
    assert stock_misfit(tmp_path) is None


def test_parts_of_larger_tensors(tmp_path):
    """Slices of one tensor are written without what is between them; only those that overlap are copied."""
    layer, whole = nn.Linear(4, 2), torch.randn(100, 4)
    layer.weight, layer.bias = nn.Parameter(whole[:2]), nn.Parameter(whole[2, :2])
    plain = plain_tensors(layer)
    assert {k: v.data_ptr() for k, v in plain.items()} == {k: v.data_ptr() for k, v in layer.state_dict().items()}
    save_file(plain, tmp_path / "parts.safetensors")
    assert (tmp_path / "parts.safetensors").stat().st_size < 100 * 4 * 4
    layer.bias = nn.Parameter(whole[1, :2])  # inside the weight
    plain = plain_tensors(layer)
    assert len({plain[k].data_ptr() for k in plain} & {v.data_ptr() for v in layer.state_dict().values()}) == 1
    save_file(plain, tmp_path / "parts.safetensors")
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in load_file(tmp_path / "parts.safetensors").items())


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def broken(kind, monkeypatch):
    """Make the save fail while it writes either file, or at a rename, once."""
    if kind == "weights":

        def half_written(tensors, path, metadata=None):
            path.write_bytes(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr(hub, "save_file", half_written)
    elif kind == "config":

        def half_config(model, path, model_args=None):
            with open(path, "w") as file:
                file.write("{")
            raise OSError("No space left on device")

        monkeypatch.setattr(hub._hub, "save_config_for_hf", half_config)
    else:
        real, name = os.replace, kind

        def refused(source, target):
            if os.path.basename(target) == name:
                monkeypatch.undo()
                raise OSError("No space left on device")
            real(source, target)

        monkeypatch.setattr(os, "replace", refused)


@pytest.mark.parametrize("kind", ["weights", "config", "model.safetensors", "config.json", "now"])
def test_a_failing_save_changes_nothing(kind, tmp_path, monkeypatch):
    """Whichever write or rename fails, the folder's files are the old ones, whole, and no others."""
    model = stock("vit_tiny_patch16_224", depth=1, num_classes=2)
    save_pretrained(model, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = content(tmp_path)
    timm_resize.resize_(model, 96)
    broken(kind, monkeypatch)
    with pytest.raises(OSError, match=r"^No space left on device$"):
        save_pretrained(model, tmp_path)
    assert content(tmp_path) == before
    monkeypatch.undo()
    save_pretrained(model, tmp_path)
    after = content(tmp_path)
    assert after.keys() == before.keys()
    assert after["README.md"] == b"mine"
    assert after["model.safetensors"] != before["model.safetensors"]
    assert stock_misfit(tmp_path) is None


@pytest.mark.parametrize("kind", ["weights", "config", "model.safetensors", "config.json", "now"])
def test_a_failing_first_save_leaves_no_folder(kind, tmp_path, monkeypatch):
    """A folder that the save made is gone again after a failure."""
    model = stock("vit_tiny_patch16_224", depth=1, num_classes=2)
    broken(kind, monkeypatch)
    with pytest.raises(OSError, match=r"^No space left on device$"):
        save_pretrained(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("how", "each"), [("kill", 3), *(pytest.param(how, 1, marks=pytest.mark.slow) for how in ("kill", "fail"))]
)
def test_a_save_that_ends_at_any_file_operation(how, each, tmp_path, record_property):
    """A real SIGKILL, or an error, at each n-th operation: the folder holds the old files or the new, all whole."""
    count = ended_saves(how, each, tmp_path)
    assert count * each > 20
    record_property("faults", count)


def test_models_that_cannot_be_rebuilt(tmp_path):
    """Feature extractors, models of no timm factory and meta tensors are refused with the way out; nothing written."""
    advice = (
        "not a model that timm can rebuild from a config. Save the whole classification model that create_model "
        "returned, without features_only=True; of a model of another library, its state dict with torch.save."
    )
    with torch.device("meta"):
        on_meta = stock("vit_tiny_patch16_224", depth=1)
    for model, text in (
        (stock("test_resnet", features_only=True), f"FeatureListNet: {advice}"),
        (nn.Linear(1, 1), f"Linear: {advice}"),
        (on_meta, "VisionTransformer: cls_token has no values (meta device). Load weights, then save."),
    ):
        with pytest.raises(timm_resize.UnsupportedModelError) as caught:
            save_pretrained(model, tmp_path / "new")
        assert str(caught.value) == text
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_are_not_json(tmp_path):
    """A constructor argument that JSON cannot hold is named, and can be replaced by one that it can."""
    model = stock("vit_tiny_patch16_224", depth=1, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    with pytest.raises(timm_resize.ResizeError) as caught:
        save_pretrained(model, tmp_path)
    assert str(caught.value) == (
        "VisionTransformer: Model argument 'norm_layer' is not serializable; provide a model_args replacement. "
        "Pass save_pretrained(..., model_args={…})."
    )
    save_pretrained(model, tmp_path, model_args={"norm_layer": "layernorm"})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.norm.eps == 1e-6
    with pytest.raises(timm_resize.UnsupportedModelError, match=re.escape("opened with its config LayerNorm((192,), ")):
        save_pretrained(
            stock("vit_tiny_patch16_224", depth=1, norm_layer=nn.LayerNorm),
            tmp_path,
            model_args={"norm_layer": "layernorm"},
        )


def test_misfit_says_what_does_not_fit(tmp_path):
    """A config that builds other shapes, other tensors or nothing is found out without loading weights."""
    model = stock("vit_tiny_patch16_224", depth=1)
    timm_resize.resize_(model, 96)
    config = config_of(model, tmp_path)

    def misfit(**model_args):
        changed = {**config, "model_args": {**config["model_args"], **model_args}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        return stock_misfit(tmp_path)

    assert misfit() is None
    assert misfit(img_size=224) == "pos_embed is [1, 37, 192], stock builds [1, 197, 192]"
    assert misfit(qkv_bias=False) == "blocks.0.attn.qkv.bias is in only one of the two"
    assert "unexpected keyword argument 'nonsense'" in misfit(nonsense=1)


def test_misfit_of_a_forward_that_fails(tmp_path):
    """A model that stock builds but cannot run is found out: ConViT takes its grid for a square one."""
    model = stock("convit_tiny", depth=1, local_up_to_layer=1)
    timm_resize.resize_(model, (192, 256))
    save_pretrained(model, tmp_path)
    assert (stock_misfit(tmp_path) or "").startswith("RuntimeError: The expanded size of the tensor (192) must match")
    x = image((192, 256))
    again = timm_resize.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(192, 256)).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("size", [(180, 264), (288, 216)])
def test_sizes_that_one_scale_a_branch_cannot_give(size, tmp_path):
    """CrossViT's branches are whole patches there, which no argument of stock's constructor says; we open them."""
    model = redraw_(stock("crossvit_9_240", depth=[[1, 1, 0]], embed_dim=[32, 64], num_heads=[2, 2]))
    timm_resize.resize_(model, size)
    save_pretrained(model, tmp_path)
    assert (stock_misfit(tmp_path) or "").startswith("pos_embed_")
    for asked in ({}, {"img_size": size}):
        again = timm_resize.create_model(f"local-dir:{tmp_path}", pretrained=True, **asked).eval()
        with torch.no_grad():
            assert torch.equal(again(image(size)), model(image(size)))


def test_a_patch_size_that_stocks_constructor_does_not_take(tmp_path):
    """Registered mixers pass theirs twice, so stock opens none with another; we open it with the one it has."""
    model = redraw_(stock("mixer_s32_224", mlp_ratio=(0.125, 0.25), num_classes=2))
    timm_resize.resize_(model, (96, 128), patch_size=8)
    save_pretrained(model, tmp_path)
    for asked in ({}, {"img_size": (96, 128)}):
        again = timm_resize.create_model(f"local-dir:{tmp_path}", pretrained=True, **asked).eval()
        with torch.no_grad():
            assert torch.equal(again(image((96, 128))), model(image((96, 128))))


def vit(**kwargs):
    return timm_resize.create_model("vit_tiny_patch16_224", img_size=96, depth=1, **kwargs).eval()


def test_a_plain_classifier_of_another_width_is_said_in_the_config(tmp_path):
    """`m.head = nn.Linear(192, 7)` saves as seven classes: stock opens it, and computes the same."""
    model = vit()
    model.head = torch.nn.Linear(192, 7)
    timm_resize.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.num_classes == 7
    assert torch.equal(again(image((96, 96))), model(image((96, 96))))


def test_a_projection_of_four_channels_is_said_in_the_config(tmp_path):
    """A replaced patch projection saves as `in_chans=4`: stock opens it, and computes the same."""
    model = vit()
    model.patch_embed.proj = torch.nn.Conv2d(4, 192, 16, 16)
    timm_resize.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 4, 96, 96)
    assert torch.equal(again(x), model(x))


def test_the_count_of_classes_stands_once(tmp_path):
    """`model_args` has no `num_classes`, which transformers' Auto classes would be given twice."""
    timm_resize.save_pretrained(vit(num_classes=5), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_classes"] == 5
    assert "num_classes" not in config["model_args"]
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 5


def test_norms_that_are_synchronised_between_processes_are_saved(tmp_path):
    """They are the plain ones to whoever opens the folder."""
    model = redraw_(stock("test_resnet", num_classes=2))
    save_pretrained(convert_sync_batchnorm(copy.deepcopy(model)), tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(image((160, 160))), model(image((160, 160))))


def changed(how):
    """Return a model that nothing would build from its config, or something that holds more than a model."""
    model = vit()
    if how == "two layers":
        model.head = torch.nn.Sequential(torch.nn.Linear(192, 8), torch.nn.Linear(8, 7))
    elif how == "another norm":
        model.norm = torch.nn.RMSNorm(192)
    elif how == "pruned":
        prune.l1_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)
    elif how == "adapter":
        model.blocks[0].attn.qkv.lora_A = torch.nn.Linear(192, 4)
    elif how == "another activation":
        model.blocks[0].mlp.act = torch.nn.ReLU()
    elif how == "another eps":
        model.norm = torch.nn.LayerNorm(192, eps=1e-3)
    elif how == "another class":
        model.blocks[0].mlp.fc1 = type("Scaled", (torch.nn.Linear,), {})(192, 768)
    elif how == "a layer more":
        model.head_drop = torch.nn.Tanh()
    elif how == "a block less":
        model.blocks = torch.nn.Sequential()
    elif how == "holder":
        return torch.nn.Sequential(model, torch.nn.Linear(1000, 7))
    return model


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("two layers", "head.0.weight is (8, 192), and a model built from its config has none"),
        ("another norm", "norm.bias is not there, and a model built from its config has (192,)"),
        ("pruned", "blocks.0.mlp.fc1.weight_orig is (768, 192), and a model built from its config has none"),
        ("adapter", "blocks.0.attn.qkv.lora_A.weight is (4, 192), and a model built from its config has none"),
        ("another activation", "blocks.0.mlp.act is ReLU(), and opened with its config GELU(approximate='none')"),
        ("another eps", "norm is LayerNorm((192,), eps=0.001, elementwise_affine=True, bias=True), and opened with"),
        ("another class", "blocks.0.mlp.fc1 is Scaled(in_features=192, out_features=768, bias=True), and opened"),
        ("a layer more", "head_drop is Tanh(), and opened with its config Dropout(p=0.0, inplace=False)"),
        ("a block less", "blocks.0.norm1.weight is not there, and a model built from its config has (192,)"),
        ("holder", "Sequential: 1.weight is not of the VisionTransformer that it holds, and would be lost"),
    ],
)
def test_what_would_not_open_again_is_refused_and_leaves_what_was_there(how, text, tmp_path):
    """The error names the first tensor that differs; the folder keeps its files, byte for byte."""
    timm_resize.save_pretrained(vit(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(timm_resize.UnsupportedModelError, match=re.escape(text)):
        timm_resize.save_pretrained(changed(how), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_random_weights_say_that_they_are(tmp_path):
    """Neither the card nor the metadata names a checkpoint that was not loaded; one that was is named."""
    timm_resize.save_pretrained(vit(), tmp_path / "random")
    card = (tmp_path / "random" / "README.md").read_text()
    assert "Checkpoint: random initialisation, or weights that were loaded by something else" in card
    assert "base_model" not in card
    assert "augreg" not in card
    again = timm_resize.create_model(f"local-dir:{tmp_path / 'random'}", pretrained=True, img_size=64)
    timm_resize.save_pretrained(again, tmp_path / "loaded")
    assert "Checkpoint: random, resized from" in (tmp_path / "loaded" / "README.md").read_text()


def test_words_of_a_file_are_words_in_the_card(tmp_path):
    """A history that somebody wrote into a file cannot put Markdown, links or front matter into the next card."""
    event = {"checkpoint": "x\n---\n[here](http://e.vil) <script>`", "img_size": [96, 96]}
    record = json.dumps({"img_size": [96, 96], "history": [event, event]})
    path = str(tmp_path / "weights.safetensors")
    save_file(vit().state_dict(), path, metadata={"timm_resize": record})
    model = timm_resize.create_model("vit_tiny_patch16_224", img_size=96, depth=1, checkpoint_path=path)
    timm_resize.save_pretrained(model, tmp_path / "next")
    card = (tmp_path / "next" / "README.md").read_text()
    assert "- checkpoint: x?---??here??http://e.vil? ?script??, 96x96" in card


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "large"])
def test_what_is_no_plain_file_in_the_cards_place_is_left_alone(kind, tmp_path):
    """A link, a pipe, a folder or a huge README.md is neither read nor replaced."""
    card = tmp_path / "README.md"
    if kind == "link":
        (tmp_path / "elsewhere").write_text("theirs")
        card.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(card)
    elif kind == "folder":
        card.mkdir()
    else:
        card.write_bytes(b"x" * (1 << 21))
    before = card.lstat()
    timm_resize.save_pretrained(vit(), tmp_path)
    after = card.lstat()
    assert (before.st_ino, before.st_mode, before.st_size) == (after.st_ino, after.st_mode, after.st_size)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).patch_embed.img_size == (96, 96)
