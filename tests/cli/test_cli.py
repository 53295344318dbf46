"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import logging
import os
import runpy
import socket
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import timm_resize
from tests.helpers.forks import in_forks
from tests.helpers.oracle import assert_close, redraw_, stock
from timm_resize.cli import convert, main
from timm_resize.hub import save as hub

TINY = ["vit_tiny_patch16_224", "--model-kwargs", "depth=1", "num_classes=2"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection is a failure."""

    def refuse(*args):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def run(capsys, *argv):
    """Return the exit status, stdout and stderr of a call in this process."""
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_plan_text(capsys, tmp_path, monkeypatch):
    """Plan prints the changed tensors and both sides' costs, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "plan", *TINY, "--img-size", "320x448")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == [
        "VisionTransformer: 224x224 -> 320x448",
        "  pos_embed  parameter  1x197x192 -> 1x561x192  resampled: bicubic antialias",
        "",
    ]
    assert lines[3].split() == ["224x224", "320x448", "ratio"]
    assert lines[4].split() == ["tokens", "197", "561", "2.85"]  # 14*14 + 1, 20*28 + 1
    assert lines[8].split()[-3:] == ["0.444", "3.60", "8.11"]  # 3 heads * tokens^2 * 4 bytes / 2^20
    assert len(lines) == 12
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["320x448", "320,448", "320X448"])
def test_spellings_of_a_size(capsys, text):
    """Height and width are separated by an x or a comma."""
    status, out, _ = run(capsys, "plan", *TINY, "--img-size", text)
    assert status == 0
    assert out.startswith("VisionTransformer: 224x224 -> 320x448\n")


def test_plan_takes_the_options_of_plan_resize(capsys):
    """Window, patch and interpolation options reach the plan: its text is that of plan_resize with them."""
    model = stock("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24)
    kwargs = ("--model-kwargs", "depths=(1,1,1,1)", "embed_dim=24")
    for flags, options in (
        (("--window-size", "8x4"), {"window_size": (8, 4)}),
        (("--window-size", "8,8,8,4"), {"window_size": (8, 8, 8, 4)}),
        (("--window-policy", "keep"), {"window_policy": "keep"}),
        (
            ("--window-policy", "scale", "--interpolation", "bilinear"),
            {"window_policy": "scale", "interpolation": "bilinear"},
        ),
    ):
        status, out, err = run(capsys, "plan", "swin_tiny_patch4_window7_224", *kwargs, "--img-size", "256", *flags)
        assert (status, err) == (0, "")
        assert out.startswith(timm_resize.plan_resize(model, 256, **options).summary() + "\n\n")
    for flags, options in (
        (("--patch-size", "8"), {"patch_size": 8}),
        (("--patch-size", "8", "--patch-resample", "adjoint"), {"patch_size": 8, "patch_resample": "adjoint"}),
        (("--no-antialias",), {"antialias": False}),
        (("--preset", "big_vision"), {"preset": "big_vision"}),
    ):
        status, out, err = run(capsys, "plan", *TINY, "--img-size", "256", *flags)
        assert (status, err) == (0, "")
        vit = stock("vit_tiny_patch16_224", depth=1, num_classes=2)
        assert out.startswith(timm_resize.plan_resize(vit, 256, **options).summary() + "\n\n")


def test_plan_says_what_is_dropped(capsys, recwarn):
    """Pixels that the patches drop are a note of the plan, not a Python warning."""
    status, out, err = run(capsys, "plan", *TINY, "--img-size", "230")
    assert (status, err) == (0, "")
    assert (
        "  note: img_size=(230, 230) drops 6 rows and 6 columns of pixels at the bottom and right: patch_size=16."
        in out.splitlines()
    )
    assert not [w for w in recwarn if "pixels" in str(w.message)]


def test_plan_of_a_saved_model(capsys, tmp_path):
    """A local folder is planned from its config, whose size is the one before."""
    run(capsys, "convert", *TINY, "--no-pretrained", "--img-size", "96x160", "--output", tmp_path)
    status, out, err = run(capsys, "plan", f"local-dir:{tmp_path}", "--img-size", 224)
    assert (status, err) == (0, "")
    assert out.startswith("VisionTransformer: 96x160 -> 224x224\n")


def test_convert_without_weights(capsys, tmp_path):
    """Random weights need no download; what is printed was written, and stock timm reads it."""
    folder = tmp_path / "new"
    status, out, err = run(capsys, "convert", *TINY, "--no-pretrained", "--img-size", "96x160", "--output", folder)
    assert (status, err) == (0, "")
    size = (folder / "model.safetensors").stat().st_size / 1e6
    assert out.splitlines() == [
        "VisionTransformer: 224x224 -> 96x160",
        "  pos_embed  parameter  1x197x192 -> 1x61x192  resampled: bicubic antialias",
        f"wrote {folder}/model.safetensors ({size:.1f} MB)",
        f"wrote {folder}/config.json (0.0 MB)",
        f'load it with timm.create_model("local-dir:{folder}", pretrained=True)',
    ]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model(torch.zeros(1, 3, 96, 160)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", "layers=(1,1,1,1)"),
        ("levit_128s", "depth=(1,1,1)"),
        ("swin_tiny_patch4_window7_224", "depths=(1,1,1,1) embed_dim=24"),
    ],
)
def test_convert_other_families(name, kwargs, capsys, tmp_path):
    """A size-free, a table and a window model convert and reload in stock timm, with the input size recorded."""
    flags = ("--no-pretrained", "--img-size", "192x256", "--output", tmp_path, "--model-kwargs", *kwargs.split())
    status, _, err = run(capsys, "convert", name, *flags)
    assert (status, err) == (0, "")
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 192, 256)


@pytest.fixture(scope="module")
def trained():
    """A ViT of 3 classes whose weights stand for trained ones, 224 px."""
    return redraw_(stock("vit_tiny_patch16_224", depth=1, num_classes=3))


def save_checkpoint(model, path):
    """Write a checkpoint as its suffix says; a .pth nests the weights as training scripts do."""
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_convert_a_file(suffix, trained, capsys, tmp_path):
    """A checkpoint file becomes what stock's set_input_size makes of its weights; the classes are the file's."""
    save_checkpoint(trained, tmp_path / f"weights{suffix}")
    status, _, err = run(
        capsys,
        "convert",
        tmp_path / f"weights{suffix}",
        "--model",
        "vit_tiny_patch16_224",
        "--model-kwargs",
        "depth=1",
        "--img-size",
        "96x160",
        "--output",
        tmp_path / "out",
    )
    assert (status, err) == (0, "")
    want = stock("vit_tiny_patch16_224", depth=1, num_classes=3)
    want.load_state_dict(trained.state_dict())
    want.set_input_size((96, 160))
    assert_close(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), want)


@pytest.mark.parametrize(("size", "flags"), [(96, ()), ((96, 160), ("--source-size", "96x160"))])
def test_convert_a_file_of_another_size(size, flags, capsys, tmp_path):
    """A file saved at another size is read there: square sizes by its shapes, others by --source-size."""
    source = redraw_(stock("vit_tiny_patch16_224", depth=1, num_classes=3, img_size=size))
    save_checkpoint(source, tmp_path / "weights.pth")
    status, out, err = run(
        capsys,
        "convert",
        tmp_path / "weights.pth",
        "--model",
        "vit_tiny_patch16_224",
        *flags,
        "--model-kwargs",
        "depth=1",
        "--img-size",
        "192",
        "--output",
        tmp_path / "out",
    )
    assert (status, err) == (0, "")
    text = "96x96" if size == 96 else "96x160"
    assert out.startswith(f"VisionTransformer: {text} -> 192x192\n")
    source.set_input_size(192)
    assert_close(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), source)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads Linux's list of mappings")
def test_convert_leaves_tensors_in_their_file(tmp_path):
    """What does not depend on the size is never copied into memory: it lies in the mapping of the source file."""
    path = tmp_path / "weights.safetensors"
    save_checkpoint(stock("vit_tiny_patch16_224", depth=1), path)
    overlay = {"file": str(path)}
    model = convert._open("vit_tiny_patch16_224", {"pretrained_cfg_overlay": overlay, "depth": 1})
    timm_resize.resize_(model, 96)
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(path))]
    assert ranges
    outside = [
        key
        for key, tensor in hub.plain_tensors(model).items()
        if not any(int(a, 16) <= tensor.data_ptr() < int(b, 16) for a, b in ranges)
    ]
    assert outside == ["pos_embed"]


def test_convert_to_other_classes(trained, capsys, tmp_path):
    """--num-classes draws a new classifier and keeps every other weight of the file."""
    save_checkpoint(trained, tmp_path / "weights.pth")
    argv = ("--model", "vit_tiny_patch16_224", "--num-classes", 7, "--model-kwargs", "depth=1", "--img-size", 224)
    status, _, err = run(capsys, "convert", tmp_path / "weights.pth", *argv, "--output", tmp_path / "out")
    assert (status, err) == (0, "")
    got, want = load_file(tmp_path / "out" / "model.safetensors"), trained.state_dict()
    assert got["head.weight"].shape == (7, 192)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_classes"] == 7
    assert all(torch.equal(got[k], want[k]) for k in want if not k.startswith("head."))


def test_convert_a_folder(capsys, tmp_path):
    """A saved folder is a source again, read at its own size."""
    run(capsys, "convert", *TINY, "--no-pretrained", "--img-size", "96x160", "--output", tmp_path / "a")
    source = f"local-dir:{tmp_path / 'a'}"
    status, out, err = run(capsys, "convert", source, "--img-size", 96, "--output", tmp_path / "b")
    assert (status, err) == (0, "")
    assert out.startswith("VisionTransformer: 96x160 -> 96x96\n")
    want = timm.create_model(source, pretrained=True)
    want.set_input_size(96)
    assert_close(timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True), want)


def test_force(capsys, tmp_path):
    """A model in the folder is overwritten with --force only."""
    argv = ["convert", *TINY, "--no-pretrained", "--output", str(tmp_path), "--img-size"]
    assert run(capsys, *argv, 96)[0] == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    status, out, err = run(capsys, *argv, 128)
    assert (status, out) == (2, "")
    assert err == (
        f"timm-resize convert: error: --output {tmp_path} already holds model.safetensors and config.json. "
        "Use --force to overwrite.\n"
    )
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert run(capsys, *argv, 128, "--force")[0] == 0
    assert load_file(tmp_path / "model.safetensors")["pos_embed"].shape == (1, 65, 192)


HELP = "Use --img-size 224 for a square, or --img-size 192x256 for height and width."
OUT = ("--img-size", "96", "--output", "out")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("plan", *TINY, "--img-size", "0"), f"VisionTransformer: --img-size 0 has a side below 1. {HELP}"),
        (("plan", *TINY, "--img-size", "-224"), f"VisionTransformer: --img-size -224 has a side below 1. {HELP}"),
        (
            ("plan", *TINY, "--img-size", "3x224x224"),
            f"VisionTransformer: --img-size 3x224x224 has 3 numbers, not (height, width). {HELP}",
        ),
        (("plan", *TINY, "--img-size", "8"), "VisionTransformer: --img-size 8 is smaller than patch_size=16. Use 16."),
        (
            ("plan", *TINY, "--img-size", "224", "--window-size", "7"),
            "VisionTransformer: --window-size 7 is not an option of this model. Use img_size, patch_size.",
        ),
        (
            ("plan", "vit_tinny_patch16_224", "--img-size", "224"),
            "timm has no model vit_tinny_patch16_224. Did you mean vit_tiny_patch16_224, deit_tiny_patch16_224, "
            "vit_tiny_patch16_384?",
        ),
        (
            ("plan", "vit_tiny_patch16_224.nope", "--img-size", "224"),
            "vit_tiny_patch16_224 has no weights nope. Use one of augreg_in21k, augreg_in21k_ft_in1k.",
        ),
        (
            ("plan", "vit_tiny_patch16_224.augreg_in21", "--img-size", "224"),
            "vit_tiny_patch16_224 has no weights augreg_in21. Did you mean augreg_in21k, augreg_in21k_ft_in1k?",
        ),
        (
            ("plan", "swin_t", "--img-size", "224"),
            "timm has no model swin_t. Did you mean swin_tiny_patch4_window7_224?",
        ),
        (
            ("plan", "local-dir:nowhere", "--img-size", "224"),
            "local-dir:nowhere: there is no nowhere/config.json. Give a folder that a model was saved to.",
        ),
        (
            ("plan", "hf-hub:timm/vit_tiny_patch16_224", "--img-size", "224"),
            "hf-hub:timm/vit_tiny_patch16_224 would be downloaded. Give the architecture's name, or convert it.",
        ),
        (
            ("plan", "vit_tiny_patch16_224", "--img-size", "224", "--model-kwargs", "nonsense=1"),
            "vit_tiny_patch16_224: VisionTransformer.__init__() got an unexpected keyword argument 'nonsense'",
        ),
        (
            ("convert", "nowhere.pth", *OUT, "--model", "vit_tiny_patch16_224"),
            "nowhere.pth: there is no such file. Check the path.",
        ),
        (("convert", "here.pth", *OUT), "here.pth is a checkpoint file. Give --model NAME, the timm model it is of."),
        (
            ("convert", "here.pth", *OUT, "--model", "vit_tiny_patch16_224", "--no-pretrained"),
            "here.pth would not be read with --no-pretrained. Leave one of them out.",
        ),
        (
            ("convert", "here.safetensors", *OUT, "--model", "vit_tiny_patch16_224"),
            "here.safetensors cannot be read: (what safetensors says). Give a checkpoint file.",
        ),
        (
            ("convert", *TINY, *OUT, "--model", "vit_tiny_patch16_224"),
            "--model goes with a checkpoint file, not with vit_tiny_patch16_224. Leave it out.",
        ),
        (("convert", "folder", *OUT), "folder is a folder. Use local-dir:folder."),
        (
            ("convert", *TINY, "--no-pretrained", "--img-size", "96", "--output", "here.pth"),
            "--output here.pth is a file. Give a folder.",
        ),
    ],
)
def test_errors(argv, text, capsys, tmp_path, monkeypatch):
    """Each mistake is one line on stderr that says the way out, status 2, no traceback, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.pth").write_bytes(b"")
    (tmp_path / "here.safetensors").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SafetensorError) as caught:
        load_file("here.safetensors")
    text = text.replace("(what safetensors says)", str(caught.value))
    assert run(capsys, *argv) == (2, "", f"timm-resize {argv[0]}: error: {text}\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "here.pth", "here.safetensors"]


def test_a_file_that_does_not_fit(capsys, tmp_path):
    """A checkpoint whose shapes fit no square size asks for the size; one of another model names a tensor."""
    save_checkpoint(stock("vit_tiny_patch16_224", depth=1, img_size=(96, 160)), tmp_path / "wide.pth")
    argv = ("--model-kwargs", "depth=1", "--img-size", 96, "--output", tmp_path / "out")
    status, out, err = run(capsys, "convert", tmp_path / "wide.pth", "--model", "vit_tiny_patch16_224", *argv)
    assert (status, out) == (2, "")
    assert err == (
        f"timm-resize convert: error: vit_tiny_patch16_224: {tmp_path}/wide.pth fits no square image size. "
        "Give --source-size HxW, the size it was saved at.\n"
    )
    argv = ("--img-size", 96, "--output", tmp_path / "out", "--source-size", "96x160")
    status, out, err = run(capsys, "convert", tmp_path / "wide.pth", "--model", "vit_tiny_patch16_224", *argv)
    assert (status, out) == (2, "")
    assert err == (
        "timm-resize convert: error: VisionTransformer: the checkpoint is of another model: it lacks "
        "blocks.1.norm1.weight and 131 others. Build the model with the arguments that it was saved with "
        "(depth, num_classes …).\n"
    )
    assert err.count("\n") == 1
    assert len(err) < 700
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answers", [True, False])
def test_a_download_that_fails(answers, capsys, tmp_path, monkeypatch):
    """Without a network, weights that must be fetched are one line of error, after one try, or none without a Hub."""
    from timm.models import _builder

    from timm_resize.cli import _sources

    tried = []

    def offline(*args, **kwargs):
        tried.append(args)
        raise LocalEntryNotFoundError("We cannot find the requested files.\nPlease check your connection.")

    if answers:
        monkeypatch.setattr(_sources, "get_session", lambda: SimpleNamespace(head=lambda *args, **kwargs: None))
    monkeypatch.setattr(_sources, "hf_hub_download", offline)
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", offline)
    status, out, err = run(capsys, "convert", "vit_tiny_patch16_224", "--img-size", 96, "--output", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err == (
        "timm-resize convert: error: vit_tiny_patch16_224: the Hub cannot be reached, and model.safetensors of "
        "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k is not on this machine. Check the connection, or give "
        "--no-pretrained.\n"
    )
    once = [("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors")]
    assert tried == (once if answers else [])


def test_what_cannot_be_is_known_before_a_download(capsys, tmp_path, monkeypatch):
    """A size that cannot work, or a disk without space, ends a conversion before anything is fetched."""
    from timm_resize.cli import _sources

    def download(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(_sources, "hf_hub_download", download)
    argv = ("convert", "vit_tiny_patch16_224", "--output", tmp_path / "out", "--img-size")
    status, _, err = run(capsys, *argv, 8)
    assert (status, err.count("\n")) == (2, 1)
    assert "--img-size 8 is smaller" in err
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=22_000_000))  # 5.7 M numbers are 23 MB
    status, _, err = run(capsys, *argv, 96)
    assert status == 2
    assert err == (f"timm-resize convert: error: {tmp_path} has 0.0 GB left and 0.0 GB are to be written. Make room.\n")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ((), "the following arguments are required: COMMAND."),
        (("grow", "--x"), "argument COMMAND: 'grow' is not known. Use one of compare, convert, families, inspect"),
        (("plann",), "argument COMMAND: 'plann' is not known. Did you mean plan?"),
        (("plan", *TINY), "the following arguments are required: --img-size."),
        (("plan", *TINY, "--img-sise=224"), "there is no option --img-sise. Did you mean --img-size, --window-size?"),
        (
            ("plan", *TINY, "--img-size", "large"),
            "argument --img-size: 'large' is not a size. Use 384, or 320x448 for height x width.",
        ),
        (("plan", *TINY, "--img-size", "224.0"), "argument --img-size: '224.0' is not a size."),
        (
            ("plan", *TINY, "--img-size", "8", "--model-kwargs", "depth"),
            "argument --model-kwargs: 'depth' is not key=value, e.g. in_chans=1.",
        ),
        (
            ("plan", *TINY, "--img-size", "8", "--window-policy", "sale"),
            "argument --window-policy: 'sale' is not known. Did you mean scale?",
        ),
    ],
)
def test_usage_errors(argv, text, capsys):
    """A wrong command line exits with status 2 and one line that says what is wrong, and where the usage is."""
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    command = " ".join(["timm-resize", *argv[:1]]) if argv[:1] == ("plan",) else "timm-resize"
    assert err.startswith(f"{command}: error: {text}")
    assert err.endswith(f" Help: {command} --help\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "convert", "families", "compare", "inspect", "push"])
def test_help_has_an_example(command, capsys):
    """Each command's help ends with a command line that its own parser accepts."""
    from timm_resize.cli import parser

    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    example = capsys.readouterr().out.rstrip().splitlines()[-1].split()
    assert example[:2] == ["timm-resize", command]
    assert parser().parse_args(example[1:]).run is not None


def test_version(capsys):
    """The version names what a bug report needs, as the packages' metadata has it."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == (
        f"timm-resize {timm_resize.__version__} (timm {timm.__version__}, torch {torch.__version__.split('+')[0]})\n"
    )


def test_families(capsys, monkeypatch):
    """Every registered model class has a row, and ViT's counts the models that building them finds to be one."""
    from timm_resize.core.registry import handler_for, handlers

    status, out, err = run(capsys, "families")
    assert (status, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert {h.cls.__name__ for h in handlers() if h.is_model} <= rows.keys()
    assert "patch_embed.PatchEmbed" not in rows
    names = timm.list_models(module="levit")
    monkeypatch.setattr("timm.models.levit.trunc_normal_", lambda tensor, **kwargs: None)  # slow on meta
    with torch.device("meta"):
        built = {name: handler_for(type(timm.create_model(name))) for name in names}
    assert {h.cls.__name__ for h in built.values()} == {"Levit"}
    assert rows["Levit"][1] == str(len(names))
    assert f"of {len(timm.list_models())} registered models" in out
    assert "patch_embed.PatchEmbed" in run(capsys, "families", "--layers")[1]


def test_families_on_a_terminal():
    """Where the table is wider than the terminal its cells are wrapped, and keep their words in order."""
    from timm_resize.cli._common import table

    rows = [("class", "state"), ("A", "one two three four five six"), ("B", "seven")]
    assert table(rows, 19).splitlines() == [
        "class  state",
        "-----  ------------",
        "A      one two",
        "       three four",
        "       five six",
        "B      seven",
    ]
    assert table(rows, None).splitlines()[2] == "A      one two three four five six"


def test_piped(tmp_path):
    """As a program in a pipe whose reader has left, it ends in silence."""
    reader, writer = os.pipe()
    os.close(reader)

    def program():
        os.dup2(writer, 1)
        os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["timm-resize", "families"]
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("timm_resize", run_name="__main__")
        sys.stdout.close()  # as the interpreter at its end: what is left is written
        sys.stderr.close()
        return ended.value.code

    assert in_forks(program) == [0]
    assert (tmp_path / "stderr").read_text() == ""
    os.close(writer)


def test_logging_is_as_before(capsys):
    """A call leaves the levels of other packages' loggers as they were."""
    levels = {"timm": logging.INFO, "huggingface_hub": logging.CRITICAL}
    loggers = {name: logging.getLogger(name) for name in levels}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        for name, level in levels.items():
            loggers[name].setLevel(level)
        assert run(capsys, "plan", *TINY, "--img-size", 8)[0] == 2
        assert {name: logger.level for name, logger in loggers.items()} == levels
    finally:
        for name, level in before.items():
            loggers[name].setLevel(level)
