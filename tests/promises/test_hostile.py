"""Absurd and malicious input: an error before anything is allocated or written, and the next call works."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

import timm_resize
import timm_resize.core.memory
from tests.helpers.examples import EXAMPLES, each_with, example, sweep
from tests.helpers.oracle import image, redraw_, stock, tensors
from timm_resize.cli import main

NAME, ARGS = "vit_tiny_patch16_224", {"depth": 1, "num_classes": 2}

SQUARE, WIDE = (10**6, 10**6), (10**6, 500_000)
"""The largest that are taken for sizes at all."""

SMALL_ANYWHERE = {
    "botnet26t_256",
    "coat_lite_tiny",
    "coat_tiny",
    "efficientvit_m0",
    "hiera_small_abswin_256",
    "repvgg_a0",
    "resnet18",
    "resnet32ts",
    "samvit_base_patch16_224",
    "tiny_vit_21m_384",
    "tiny_vit_5m_224",
    "vit_small_patch16_dinov3",
}
"""Examples without a tensor of the size, or with a few rows for each of its sides."""

BLOCKS = {"bat_resnext26ts", "halonet26t", "lamhalobotnet50ts_256"}
"""Examples whose maps must divide into blocks of 8, which 62500 does not."""


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    ("name", "size"), [*each_with(SQUARE, sweep(turn=0, of=5)), *each_with(WIDE, sweep(turn=1, of=5))]
)
def test_sizes_beyond_any_memory(name, size, monkeypatch):
    """A plan tells the memory; a resize and a build need little, or raise before they allocate any."""
    monkeypatch.setattr(timm_resize.core.memory, "_free", lambda device: 10**9)  # on any machine the same answer
    model = example(name)
    before = {k: (v, v.clone()) for k, v in tensors(model).items()}
    calls = [lambda: timm_resize.resize_(model, size)]
    if size[0] == size[1]:
        calls.append(lambda: timm_resize.create_model(name, img_size=size, **EXAMPLES[name]))
    if name in SMALL_ANYWHERE:
        native = timm_resize.resize_(model, size).old_size
        assert timm_resize.plan_resize(model).new_size == size
        timm_resize.resize_(model, native)
    elif name in BLOCKS:
        for call in calls:
            with pytest.raises(
                timm_resize.InvalidSizeError, match=r"gives a \d+x\d+ map to .*, not divisible by its bl"
            ):
                call()
    else:
        plan = timm_resize.plan_resize(model, size)
        assert math.prod(max((c.new for c in plan.tensors if c.new), key=math.prod)) > 10**7
        assert any(note.startswith("its new tensors take ") for note in plan.notes)
        for call in calls:
            with pytest.raises(
                timm_resize.InvalidSizeError, match=r"GB for its tensors, 1\.0 GB are free on cpu\. Use a"
            ):
                call()
    for key, value in tensors(model).items():
        assert value is before[key][0] or not isinstance(value, torch.nn.Parameter)
        assert torch.equal(value, before[key][1])


PIXELS = "Use {0}=224 for a square, or {0}=(192, 256) for height and width."
OPTIONS = [
    *(("window_size", value, f"has a side {side}. {PIXELS}") for value, side in ((0, "below 1"), (-1, "below 1"))),
    ("window_size", 10**9, f"has a side above 1000000. {PIXELS}"),
    ("window_size", 2.5, f"is a float, not whole pixels. {PIXELS}"),
    ("window_size", float("nan"), f"is a float, not whole pixels. {PIXELS}"),
    ("window_size", "7", f"is a str, not whole pixels. {PIXELS}"),
    ("window_size", True, f"is a bool, not whole pixels. {PIXELS}"),
    ("window_size", (7,), "has 1 entries for 4 stages. Use one int, one (h, w), or 4 of them."),
    ("window_size", (7, 7, 7), "has 3 entries for 4 stages. Use one int, one (h, w), or 4 of them."),
    ("window_size", [[7, 7]], "has 1 entries for 4 stages. Use one int, one (h, w), or 4 of them."),
    *(("patch_size", value, f"has a side {side}. {PIXELS}") for value, side in ((0, "below 1"), (-1, "below 1"))),
    ("patch_size", 10**9, f"has a side above 1000000. {PIXELS}"),
    ("patch_size", 2.5, f"is a float, not whole pixels. {PIXELS}"),
    ("patch_size", float("nan"), f"is a float, not whole pixels. {PIXELS}"),
    ("patch_size", "7", f"is a str, not whole pixels. {PIXELS}"),
    ("patch_size", True, f"is a bool, not whole pixels. {PIXELS}"),
    ("patch_size", (7,), f"has 1 numbers, not (height, width). {PIXELS}"),
    ("patch_size", (7, 7, 7), f"has 3 numbers, not (height, width). {PIXELS}"),
    *(("interpolation", v, "is not known. Use bicubic, bilinear, nearest, geometric.") for v in ("", 3, "../x")),
    *(("interpolation", v, "is not known. Use bicubic.") for v in (("bicubic",), b"bicubic")),
    *(("window_policy", v, "is not known. Use timm, keep, scale.") for v in ("", 3)),
    ("window_policy", "scales", "is not known. Use scale."),
    ("preset", "timmm", "is not known. Use timm."),
    *((name, 3, "is not an option of this model. Use img_size, ") for name in ("img_siez", "window_sizes")),
]


@pytest.mark.parametrize(("option", "value", "text"), OPTIONS, ids=lambda v: repr(v)[:20])
def test_options_that_are_none(option, value, text):
    """A ResizeError that names option, value and what to write; a model that is as it was."""
    model = stock("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), num_classes=2, embed_dim=24)
    before = {k: (v, v.clone()) for k, v in tensors(model).items()}
    with pytest.raises(timm_resize.ResizeError) as caught:
        timm_resize.resize_(model, 256, **{option: value})
    assert str(caught.value).startswith(f"SwinTransformer: {option}={value!r} {text.format(option)}")
    assert isinstance(caught.value, timm_resize.InvalidSizeError) == (option in ("window_size", "patch_size"))
    for key, tensor in tensors(model).items():
        assert tensor is before[key][0]
        assert torch.equal(tensor, before[key][1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model saved at 96 pixels, and its folder."""
    folder = tmp_path_factory.mktemp("saved")
    model = redraw_(timm_resize.create_model(NAME, img_size=96, **ARGS))
    timm_resize.save_pretrained(model, folder)
    return model, folder


def assert_opens(model, folder):
    """At 64 pixels: the positions as stock's own function resamples them, all else bit for bit."""
    got, want = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=64), model.state_dict()
    want["pos_embed"] = resample_abs_pos_embed(model.pos_embed, [4, 4], [6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(got.pos_embed, want.pop("pos_embed"), atol=1e-5, rtol=0)
    assert got.patch_embed.img_size == (64, 64)
    assert all(torch.equal(got.state_dict()[k], v) for k, v in want.items())


NONE = "Use img_size=224 for a square, or img_size=(192, 256) for height and width."
CONFIGS = [
    ({"model_args": {"img_size": "abc"}}, f"create_model: img_size='abc' is a str, not whole pixels. {NONE}"),
    ({"model_args": {"img_size": -1}}, f"create_model: img_size=-1 has a side below 1. {NONE}"),
    (
        {"model_args": {"img_size": [1, 2, 3]}},
        f"create_model: img_size=[1, 2, 3] has 3 numbers, not (height, width). {NONE}",
    ),
    ({"model_args": {"img_size": None}}, f"create_model: img_size=None is a NoneType, not whole pixels. {NONE}"),
    ({"model_args": {"img_size": 10**6}}, "opens"),  # the tensors tell the size
    ({"pretrained_cfg": {"input_size": "x"}}, "opens"),  # of preprocessing alone
    ({"pretrained_cfg": {"input_size": [3]}}, "opens"),
    ({"pretrained_cfg": {"input_size": [3, -5, 10**9]}}, "opens"),
    ({"model_args": [1]}, "as stock"),
    ({"model_args": {"depth": "x"}}, "as stock"),
    ({"model_args": {"num_classes": "many"}}, "as stock"),
    ({"architecture": "../../etc/passwd"}, "as stock"),
    ({"architecture": 5}, "as stock"),
    ({"architecture": None}, "as stock"),
    ({"architecture": "no_such_model"}, "as stock"),
    ({"pretrained_cfg": [1]}, "as stock"),
]


def assert_fails_as_stock(folder):
    """The plugin raises the error that stock timm raises without it, and its text."""
    with pytest.raises(Exception) as theirs:  # noqa: PT011  whatever it is
        stock(f"local-dir:{folder}", pretrained=True)
    with timm_resize.install(), pytest.raises(type(theirs.value)) as ours:
        timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=64)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(("change", "outcome"), CONFIGS, ids=lambda v: repr(v)[:60])
def test_configs_that_are_none(change, outcome, saved, tmp_path):
    """A wrong config.json raises, ours where the size is wrong, else stock's own; where it does not matter it loads."""
    model, good = saved
    shutil.copytree(good, tmp_path / "bad")
    config = json.loads((good / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    if outcome == "as stock":
        assert_fails_as_stock(tmp_path / "bad")
    with timm_resize.install():
        if outcome == "opens":
            assert_opens(model, tmp_path / "bad")
        elif outcome != "as stock":
            with pytest.raises(timm_resize.InvalidSizeError) as caught:
                timm.create_model(f"local-dir:{tmp_path / 'bad'}", pretrained=True, img_size=64)
            assert str(caught.value) == outcome
        assert_opens(model, good)  # timm and the next call are as ever


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_args": {}}', "\0" * 100, "[" * 100_000])
def test_configs_that_are_no_config(text, saved, tmp_path):
    """No JSON, or JSON of something else, is stock's own error, not a crash."""
    shutil.copytree(saved[1], tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text(text)
    assert_fails_as_stock(tmp_path / "bad")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_links_in_the_output_folder_are_replaced_not_followed(name, tmp_path):
    """What a symbolic link points to is not written to, and the link's own place holds an ordinary file."""
    victim, folder = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    timm_resize.save_pretrained(timm_resize.create_model(NAME, img_size=96, **ARGS), folder)
    assert victim.read_text() == "precious"
    if name != "README.md":  # which stays, as somebody wrote it
        assert not (folder / name).is_symlink()
        assert (folder / name).stat().st_size > len("precious")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    """The system's error, and nothing written."""
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        timm_resize.save_pretrained(timm_resize.create_model(NAME, img_size=96, **ARGS), tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_not_overwritten(tmp_path, capsys):
    """The command line leaves a folder that holds a model alone without --force, and a README.md always."""
    for name in ("config.json", "README.md"):
        (tmp_path / name).write_text("mine")
    argv = [
        "convert",
        NAME,
        "--img-size",
        "64",
        "--no-pretrained",
        "--output",
        str(tmp_path),
        "--model-kwargs",
        "depth=1",
    ]
    assert main(argv) == 2
    assert "--force" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"config.json": "mine", "README.md": "mine"}
    assert main([*argv, "--force"]) == 0
    assert (tmp_path / "README.md").read_text() == "mine"
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == NAME


def test_tensors_that_are_no_images():
    """A guarded family refuses a wrong image with an error of its own, whatever the tensor is like."""
    model = timm_resize.create_model("mvitv2_tiny", img_size=64, **EXAMPLES["mvitv2_tiny"])
    for x, given in ((image((32, 32)), "32x32"), (torch.zeros(1, 3, 0, 0), "0x0")):
        with pytest.raises(timm_resize.InvalidSizeError) as caught:
            model(x)
        assert str(caught.value) == (
            f"MultiScaleVit: img_size=(64, 64) is set, and the input is {given}, where it takes 61 to 64 by 61 to 64. "
            "Resize the model to the image first: set_input_size or timm_resize.resize_."
        )
