"""The command line's manners: a quick start, JSON, silence, interrupts, errors in the words of the person who typed."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.utils import are_progress_bars_disabled

import timm_resize
from tests.helpers.oracle import stock
from timm_resize.cli import _common, main, parser
from timm_resize.cli import families as families_command
from timm_resize.core import request

TINY = ["vit_tiny_patch16_224", "--model-kwargs", "depth=1", "num_classes=2"]


def run(capsys, *argv):
    """Return the exit status, stdout and stderr of a call in this process."""
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_help_imports_neither_timm_nor_torch():
    """What answers without a model starts without the packages that take seconds; a name that is used brings them."""
    code = (
        "import sys, timm_resize.cli, timm_resize\n"
        "for argv in (['--help'], ['plan', '--help'], ['--version'], ['plann'], ['convert', 'a.pth']):\n"
        "    try: timm_resize.cli.main(argv)\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'timm', 'numpy', 'huggingface_hub'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("usage:")) == (0, 2), done.stderr


def test_choices_are_the_library_s():
    """The parser's lists, which stand in the command line so that it needs no import, are those of a resize."""
    assert request.POLICIES == _common.POLICIES
    assert request.PATCH_MAPS == _common.PATCH_MAPS
    assert tuple(request.PRESETS) == _common.PRESETS
    hints = typing.get_type_hints(request.ResizeOptions)
    assert set(_common.INTERPOLATIONS) == set(typing.get_args(typing.get_args(hints["interpolation"])[0]))
    assert set(_common.RESIZE_OPTIONS) <= hints.keys()


def test_plan_json(capsys):
    """One JSON value: the plan and both sides' costs, with the same numbers as the text."""
    status, out, err = run(capsys, "plan", *TINY, "--img-size", "320x448", "--json")
    assert (status, err) == (0, "")
    got = json.loads(out)
    plan = got["plan"]
    assert (plan["schema"], plan["model"], plan["old_size"]) == (1, "VisionTransformer", [224, 224])
    (change,) = [c for c in got["plan"]["changes"] if c["kind"] == "parameter"]
    assert (change["name"], change["action"]) == ("pos_embed", "resampled: bicubic antialias")
    assert (change["old"], change["new"]) == ([1, 197, 192], [1, 561, 192])
    assert [got["cost"][side]["tokens"] for side in ("before", "after")] == [[197], [561]]


def test_convert_json_and_inspect(capsys, tmp_path):
    """What was written, and what opens it; inspect says the same of the folder, from what is recorded there."""
    folder = tmp_path / "new"
    argv = ("convert", *TINY, "--no-pretrained", "--img-size", "96x160", "--output", folder, "--json")
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    got = json.loads(out)
    load = f'timm.create_model("local-dir:{folder}", pretrained=True)'
    assert got["files"] == [f"{folder}/model.safetensors", f"{folder}/config.json"]
    assert (got["stock"], got["load"], got["plan"]["new_size"]) == (True, load, [96, 160])
    found = json.loads(run(capsys, "inspect", folder, "--json")[1])
    assert (found["model"], found["img_size"], found["num_classes"]) == ("vit_tiny_patch16_224", [96, 160], 2)
    assert found["opens_with"] == [load]
    assert "resized from 224x224 to 96x160" in found["history"][1]
    text = run(capsys, "inspect", folder)[1]
    assert "img_size     96x160\n" in text
    assert f"opens_with   {load}\n" in text


def test_inspect_a_file_without_a_record(capsys, tmp_path):
    """Its name or --model tell the model, its shapes the size; the call that is printed opens it."""
    path = tmp_path / "vit_tiny_patch16_224.pth"
    torch.save({"state_dict": stock("vit_tiny_patch16_224", depth=1, num_classes=3, img_size=96).state_dict()}, path)
    status, out, _ = run(capsys, "inspect", path, "--json", "--model-kwargs", "depth=1")
    found = json.loads(out)
    assert (status, found["known_by"]) == (0, "the file's name")
    assert (found["img_size"], found["num_classes"]) == ([96, 96], 3)
    model = eval(found["opens_with"][0], {"timm_resize": timm_resize})
    assert model.pos_embed.shape == (1, 37, 192)
    other = path.rename(tmp_path / "weights.pth")
    assert json.loads(run(capsys, "inspect", other, "--json")[1])["model"] is None
    wrong = json.loads(run(capsys, "inspect", other, "--json", "--model", "resnet18")[1])
    assert wrong["opens_with"][0].startswith("nothing as resnet18: ResNet: the checkpoint is of another model")


def test_compare(capsys):
    """A row a model and size, of the plan and cost that each has alone; a size that cannot be is said below."""
    argv = ("compare", *TINY, "--img-size", "224", "8", "320x448")
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    rows = [line.split() for line in lines[2:4]]
    assert [row[1:3] + row[-1:] for row in rows] == [["224x224", "197", "0"], ["320x448", "561", "1"]]
    assert lines[-1] == (
        "not possible: vit_tiny_patch16_224: VisionTransformer: --img-size 8 is smaller than patch_size=16. Use 16."
    )
    records = json.loads(run(capsys, *argv, "--json")[1])
    assert [r.get("cost", {}).get("tokens") for r in records] == [[197], None, [561]]
    assert run(capsys, "compare", *TINY, "--img-size", "8")[0] == 2


def test_families_json(capsys):
    """A record a class, with the cells of the table; an empty cell is null."""
    rows = {r["class"]: r for r in json.loads(run(capsys, "families", "--json")[1])}
    assert rows["Levit"]["models"] == len(timm.list_models(module="levit"))
    assert rows["ResNet"]["state"] is None
    layers = json.loads(run(capsys, "families", "--json", "--layers")[1])
    assert "patch_embed.PatchEmbed" in [r["class"] for r in layers]


def test_quiet(capsys):
    """-q prints nothing, not even bars of downloads, and the status still tells; errors are said."""
    assert run(capsys, "plan", *TINY, "--img-size", 96, "-q") == (0, "", "")
    hidden = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families_command, "run", lambda args: hidden.append(are_progress_bars_disabled()))
        assert [run(capsys, "families", *flag)[0] for flag in (["-q"], [])] == [0, 0]
    assert hidden == [True, False]
    status, out, err = run(capsys, "plan", *TINY, "--img-size", 8, "-q")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_verbose(capsys, recwarn):
    """-v lets logs and warnings through."""
    assert run(capsys, "plan", *TINY, "--img-size", 230, "-v")[0] == 0
    assert [w for w in recwarn if "pixels" in str(w.message)]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (ZeroDivisionError("x / 0"), 1)])
def test_interrupts_and_what_nobody_expected(error, status, capsys, monkeypatch):
    """Each is one line on stderr with a status of its own; --traceback shows the latter whole."""

    def broken(args):
        raise error

    monkeypatch.setattr(families_command, "run", broken)
    text = "interrupted" if status == 130 else "unexpected ZeroDivisionError: x / 0. With --traceback it says where."
    assert run(capsys, "families") == (status, "", f"timm-resize families: {text}\n")
    if status == 1:
        with pytest.raises(ZeroDivisionError):
            main(["families", "--traceback"])


def test_an_interrupted_conversion_leaves_nothing(capsys, tmp_path, monkeypatch):
    """Not even the folder that it made, wherever in the writing it was."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_resize.hub.save.save_file", interrupted)
    argv = ("convert", *TINY, "--no-pretrained", "--img-size", "96", "--output", tmp_path / "out")
    assert run(capsys, *argv) == (130, "", "timm-resize convert: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("img_size=(192, 256) is", "--img-size 192x256 is"),
        ("img_size=[192, 256] and 'img_size='", "--img-size 192x256 and 'img_size='"),
        ("window_size=((8, 8), (16, 8), 7) has", "--window-size 8,16x8,7 has"),
        ("window_policy='sale' is", "--window-policy sale is"),
        ("preset='deit', antialias=True", "preset='deit', antialias=True"),  # not given
        ("Use (224, 320), 224 or (1, 49, 16).", "Use 224x320, 224 or (1, 49, 16)."),
        ("num_classes=2.", "num_classes=2."),
    ],
)
def test_words_of_an_error(text, want):
    """Arguments that were given stand as on the command line, with sizes as one types them; others as they are."""
    options = {name: f"--{name.replace('_', '-')}" for name in ("img_size", "window_size", "window_policy", "preset")}
    args = argparse.Namespace(
        img_size=1, window_size=1, window_policy=1, preset=None, options={**options, "help": "-h"}
    )
    assert _common.in_options(text, args) == want


def test_the_reference_names_every_command_and_option():
    """The page has a heading for each subcommand and the name of each option; no option but those."""
    page = (Path(__file__).parents[2] / "docs" / "reference" / "command_line.md").read_text()
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    options = {o for c in commands.values() for a in c._actions for o in a.option_strings if o.startswith("--")}
    assert set(re.findall(r"^## ([a-z-]+)$", page, re.MULTILINE)) == set(commands)
    assert set(re.findall(r"`[^`\n]*?(--[a-z-]+)", page)) - {"--version"} == options
