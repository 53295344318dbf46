"""Absurd and malicious input: an error before anything is allocated or written, and the next call works."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings

import pytest
import timm
import torch

import timm_resize
from tests.helpers.oracle import image, stock, tensors
from timm_resize.cli import main
from timm_resize.core.registry import families

EXAMPLES = {name: kwargs for family in families() for name, kwargs in family.examples.items()}
NAME, ARGS = "vit_tiny_patch16_224", {"depth": 1, "num_classes": 2}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("size", [10**6, (10**6, 500_000)])
@pytest.mark.parametrize("name", EXAMPLES)
def test_sizes_beyond_any_memory(name, size):
    """A plan tells the memory, or the size is invalid; a resize needs no memory, or raises before it allocates any."""
    model = stock(name, **EXAMPLES[name])
    before = {k: (v, v.shape) for k, v in tensors(model).items()}
    plan = None
    with contextlib.suppress(timm_resize.InvalidSizeError):
        plan = timm_resize.plan_resize(model, size)
    grown = [c for c in plan.tensors if c.new and math.prod(c.new) > 10**9] if plan else []
    if grown:
        assert any("its new tensors take" in note for note in plan.notes)
    if plan is None or grown:
        with pytest.raises(timm_resize.InvalidSizeError):
            timm_resize.resize_(model, size)
        with pytest.raises(timm_resize.InvalidSizeError):
            timm_resize.create_model(name, img_size=size, **EXAMPLES[name])
    else:
        timm_resize.resize_(model, size)
        timm_resize.resize_(model, plan.old_size)
    assert all(
        v is before[k][0] and v.shape == before[k][1]
        for k, v in tensors(model).items()
        if k in before and isinstance(v, torch.nn.Parameter)
    )


@pytest.mark.parametrize(
    "options",
    [{"window_size": value} for value in (0, -1, 2.5, "7", (7,), (7, 7, 7), [[7, 7]], 10**9, float("nan"), True)]
    + [{"patch_size": value} for value in (0, -1, 2.5, "7", (7,), (7, 7, 7), 10**9, float("nan"), True)]
    + [{"interpolation": value} for value in ("", 3, "../x", ("bicubic",), b"bicubic")]
    + [{"window_policy": value} for value in ("", 3, "scales")]
    + [{"preset": "timmm"}, {"img_siez": 3}, {"window_sizes": 3}],
    ids=repr,
)
def test_options_that_are_none(options):
    """A ResizeError, and a model that is as it was."""
    model = stock("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), num_classes=2)
    before = {k: (v, v.clone()) for k, v in tensors(model).items()}
    with pytest.raises(timm_resize.ResizeError) as caught:
        timm_resize.resize_(model, 256, **options)
    assert str(caught.value).startswith("SwinTransformer: ")
    for key, value in tensors(model).items():
        assert value is before[key][0]
        assert torch.equal(value, before[key][1])


CONFIGS = [
    {"model_args": [1]},
    {"model_args": {"img_size": "abc"}},
    {"model_args": {"img_size": -1}},
    {"model_args": {"img_size": [1, 2, 3]}},
    {"model_args": {"img_size": 10**6}},
    {"model_args": {"depth": "x"}},
    {"model_args": {"img_size": None, "depth": -1}},
    {"model_args": {"num_classes": "many"}},
    {"architecture": "../../etc/passwd"},
    {"architecture": 5},
    {"architecture": None},
    {"architecture": "no_such_model"},
    {"pretrained_cfg": [1]},
    {"pretrained_cfg": {"input_size": "x"}},
    {"pretrained_cfg": {"input_size": [3]}},
    {"pretrained_cfg": {"input_size": [3, -5, 10**9]}},
]


@pytest.mark.parametrize("change", CONFIGS, ids=repr)
def test_configs_that_are_none(change, tmp_path):
    """A wrong config.json raises or, where that does not matter, loads; timm and the next call are as ever."""
    good = timm_resize.create_model(NAME, img_size=96, **ARGS)
    timm_resize.save_pretrained(good, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").write_text(path.read_text())
    (tmp_path / "good" / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with timm_resize.install():
        with contextlib.suppress(AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64)
            assert model.patch_embed.img_size == (64, 64) or pytest.fail("another size")
        again = timm.create_model(f"local-dir:{tmp_path / 'good'}", pretrained=True, img_size=64)
    assert again.patch_embed.img_size == (64, 64)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_args": {}}', "\0" * 100, "[" * 100_000])
def test_configs_that_are_no_config(text, tmp_path):
    """No JSON, or JSON of something else, is an error, not a crash."""
    timm_resize.save_pretrained(timm_resize.create_model(NAME, img_size=96, **ARGS), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Exception):  # noqa: B017, PT011  timm's own
        timm_resize.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64)


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
    for x in (image((32, 32)), torch.zeros(1, 3, 0, 0)):
        with pytest.raises(timm_resize.InvalidSizeError):
            model(x)
