"""`timm-resize run`: other people's scripts, each written here as the programs that people have write theirs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

import timm_resize
from tests.helpers.oracle import image, stock
from tests.helpers.timm_state import timm_objects
from timm_resize.cli import main

NAME = "vit_tiny_patch16_224"
KWARGS = "depth=1, embed_dim=48, num_heads=3, num_classes=2"
TINY = {"depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 2}

VALIDATE = f"""
import argparse, json, timm, torch
from timm.data import resolve_data_config
parser = argparse.ArgumentParser()
parser.add_argument("--model", default="{NAME}")
parser.add_argument("--img-size", type=int)
parser.add_argument("--input-size", type=int, nargs=3)
parser.add_argument("--checkpoint")
parser.add_argument("--built-with", type=int)
args = parser.parse_args()
kwargs = dict({KWARGS}) if args.model.startswith("vit") else dict(num_classes=2)
torch.manual_seed(0)
model = timm.create_model(args.model, img_size=args.built_with, **kwargs).eval()
if args.checkpoint:
    timm.models.load_checkpoint(model, args.checkpoint)
config = resolve_data_config(vars(args), model=model)
x = torch.linspace(-1, 1, config["input_size"][1] * config["input_size"][2] * 3).view(1, *config["input_size"])
with torch.no_grad():
    json.dump([config["input_size"], model(x).tolist()], open("out.json", "w"))
"""
"""As timm's validate.py: the size goes to the data alone, the checkpoint into a model of the default size."""

EXPORT = f"""
import argparse, json, timm
parser = argparse.ArgumentParser()
parser.add_argument("--img-size", type=int)
parser.add_argument("--checkpoint", default="")
args = parser.parse_args()
model = timm.create_model("{NAME}", checkpoint_path=args.checkpoint, exportable=True, {KWARGS})
json.dump([model.patch_embed.img_size, model.pos_embed.sum().item()], open("out.json", "w"))
"""
"""As timm's inference.py and onnx_export.py: the checkpoint goes through `create_model`."""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Write a script, run it with arguments, and return what it left in out.json."""
    monkeypatch.chdir(tmp_path)

    def run(source, *arguments, command=("run", "script.py")):
        (tmp_path / "script.py").write_text(source)
        before, argv, path = timm_objects(), sys.argv, sys.path
        try:
            assert main([*command, *map(str, arguments)]) == 0
        finally:
            assert (timm_objects(), sys.argv, sys.path) == (before, argv, path)
        out = tmp_path / "out.json"
        return json.loads(out.read_text()) if out.exists() else None

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file as timm's train.py leaves it after a run with --img-size 64, and the model."""
    torch.manual_seed(7)
    model = stock(NAME, img_size=64, **TINY).eval()
    path = tmp_path_factory.mktemp("run") / "last.pth.tar"
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "args": argparse.Namespace(img_size=64)}, path)
    return path, model


def logits(model, size):
    """What the script computes."""
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * size[0] * size[1]).view(1, 3, *size)).tolist()


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (["--img-size", "96"], (96, 96)),
        (["--img-size=32", "--img-size=96"], (96, 96)),
        (["--input-size", "3", "64", "96"], (64, 96)),
        ([], (224, 224)),
        (["--built-with", "64"], (64, 64)),
    ],
)
def test_the_data_size_is_the_models(arguments, size, script):
    """A model that is created with no size gets that of --img-size or --input-size: it is stock's of that size."""
    torch.manual_seed(0)
    want = logits(stock(NAME, img_size=size, **TINY).eval(), size)
    assert script(VALIDATE, *arguments) == [[3, *size], want]


def test_a_class_that_stock_gives_no_size(script):
    """LeViT, which stock builds at 224 alone, is validated at 96."""
    assert script(VALIDATE, "--model", "levit_128s", "--img-size", 96)[0] == [3, 96, 96]


def test_a_size_that_cannot_be_is_an_error_of_the_script(script, capsys):
    """The message is ours, the exit status that of a script with an exception."""
    with pytest.raises(SystemExit) as caught:
        script(VALIDATE, "--img-size", 8)
    assert caught.value.code == 1
    assert "InvalidSizeError: VisionTransformer: img_size=(8, 8)" in capsys.readouterr().err


def test_a_checkpoint_brings_its_size(checkpoint, script, caplog):
    """Without a size the model is validated at the checkpoint's, and the log says so."""
    path, model = checkpoint
    assert script(VALIDATE, "--checkpoint", path) == [[3, 64, 64], logits(model, (64, 64))]
    assert f"{path} is of image size 64x64, and so is the model now: no size was given." in caplog.messages
    assert script(EXPORT, "--checkpoint", path) == [[64, 64], model.pos_embed.sum().item()]


def test_a_size_that_is_given_goes_before_the_checkpoints(checkpoint, script, caplog):
    """With --img-size, or a size of its own, a model stays at it, and the weights are resized to it."""
    path, model = checkpoint
    want = timm_resize.resize_state_dict(model.state_dict(), stock(NAME, img_size=96, **TINY))["pos_embed"]
    assert script(EXPORT, "--checkpoint", path, "--img-size", 96) == [[96, 96], pytest.approx(want.sum().item())]
    for arguments in (["--img-size", 96], ["--built-with", 96]):
        assert script(VALIDATE, "--checkpoint", path, *arguments)[0] == [3, 96, 96]
    assert not any("no size was given" in message for message in caplog.messages)


def test_a_size_that_only_the_record_tells(script, tmp_path):
    """Weights that depend on no size are validated at the size on record."""
    state = stock("test_resnet", num_classes=2).state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(img_size=64)}, tmp_path / "r.pth")
    assert script(VALIDATE, "--model", "test_resnet", "--checkpoint", "r.pth")[0] == [3, 64, 64]


def test_defaults_of_a_yaml_file(script, tmp_path):
    """train.py takes defaults from `--config`; the command line goes before them."""
    (tmp_path / "a.yaml").write_text("img_size: 96\n")
    source = f"import json, timm\nm = timm.create_model('{NAME}', {KWARGS})\n"
    source += "json.dump(m.patch_embed.img_size, open('out.json', 'w'))"
    assert script(source, "-c", "a.yaml") == [96, 96]
    assert script(source, "--config", "a.yaml", "--img-size", 64) == [64, 64]
    assert script(source, "-c", "cosine") == [224, 224]


def test_a_teacher_sees_the_same_images(script):
    """A model that timm's distillation creates by name has the student's size."""
    source = f"""
    import json, timm, torch
    from timm.task import LogitDistillationTask
    from timm.models import _builder
    student = timm.create_model("{NAME}", {KWARGS})
    timm.create_model("test_vit", num_classes=2)
    teacher = timm.create_model("test_vit", pretrained=False, num_classes=2)
    task = LogitDistillationTask(student_model=student, teacher_model=teacher, verbose=False)
    out = task(torch.zeros(2, 3, 96, 96), torch.tensor([0, 1]))
    json.dump(teacher.patch_embed.img_size, open("out.json", "w"))
    """
    assert script(textwrap.dedent(source), "--img-size", 96) == [96, 96]


def test_sizes_per_batch(script):
    """With --train-img-sizes a model runs any size, as if resized to it, in the groups of the plain model."""
    source = f"""
    import json, timm, torch
    from timm.optim import param_groups_layer_decay
    torch.manual_seed(0)
    model = timm.create_model("{NAME}", {KWARGS}).eval()
    names = {{id(p): n for n, p in model.named_parameters()}}
    groups = param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.5)
    groups = [[sorted(names[id(p)] for p in g["params"]), g["weight_decay"], g["lr_scale"]] for g in groups]
    outputs = [model(torch.linspace(-1, 1, 3 * s * s).view(1, 3, s, s)).tolist() for s in (64, 96)]
    json.dump([groups, outputs, list(model.state_dict())], open("out.json", "w"))
    """
    groups, outputs, keys = script(textwrap.dedent(source), "--img-size", 96, "--train-img-sizes", 64, 96)
    torch.manual_seed(0)
    model = stock(NAME, img_size=96, **TINY).eval()
    names = {id(p): n for n, p in model.named_parameters()}
    want = param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.5)
    want = [[sorted(names[id(p)] for p in g["params"]), g["weight_decay"], g["lr_scale"]] for g in want]
    assert (groups, keys) == (want, list(model.state_dict()))
    large = logits(model, (96, 96))
    model.set_input_size(64)
    assert outputs[1] == large
    torch.testing.assert_close(torch.tensor(outputs[0]), torch.tensor(logits(model, (64, 64))))


@pytest.mark.parametrize("sizes", [[], ["--train-img-sizes", 64, 96]])
def test_a_run_resumes_at_another_size(sizes, checkpoint, script):
    """train.py's way: created, then resumed through timm.task, at the size of the command line."""
    source = f"""
    import json, sys, timm
    from timm.task import ClassificationTask, resume_task_checkpoint
    model = timm.create_model("{NAME}", {KWARGS})
    epoch = resume_task_checkpoint(ClassificationTask(model, verbose=False), sys.argv[1])
    json.dump([epoch, model.patch_embed.img_size, model.pos_embed.sum().item()], open("out.json", "w"))
    """
    want = timm_resize.resize_state_dict(checkpoint[1].state_dict(), stock(NAME, img_size=96, **TINY))["pos_embed"]
    found = script(textwrap.dedent(source), checkpoint[0], "--img-size", 96, *sizes)
    assert found == [3, [96, 96], pytest.approx(want.sum().item())]


def test_the_script_is_main(script, tmp_path):
    """Name, arguments and import path are as Python's; so for a module."""
    source = "import json, sys\njson.dump([__name__, __file__, sys.argv, sys.path[0]], open('out.json', 'w'))"
    assert script(source, "--help", "x") == ["__main__", "script.py", ["script.py", "--help", "x"], str(tmp_path)]
    found = script(source, "--a", command=("run", "-m", "script"))
    file = str(tmp_path / "script.py")
    assert found == ["__main__", file, [file, "--a"], str(tmp_path)]


@pytest.mark.parametrize(("statement", "code"), [("sys.exit(3)", 3), ("sys.exit('no')", "no"), ("sys.exit()", None)])
def test_exit_status(statement, code, script):
    """The script's own."""
    with pytest.raises(SystemExit) as caught:
        script(f"import sys\n{statement}")
    assert caught.value.code == code


def test_a_traceback_starts_in_the_script(script, capsys):
    """As Python prints it, and exit status 1; an interrupt stays one."""
    with pytest.raises(SystemExit) as caught:
        script("def f():\n    raise OSError('mine')\nf()\n")
    assert caught.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if set(line) - set(" ^~")]
    assert lines == [
        "Traceback (most recent call last):",
        '  File "script.py", line 3, in <module>',
        "    f()",
        '  File "script.py", line 2, in f',
        "    raise OSError('mine')",
        "OSError: mine",
    ]
    with pytest.raises(KeyboardInterrupt):
        script("raise KeyboardInterrupt")


def test_what_a_script_says_is_heard(script, caplog):
    """Neither warnings nor logs are swallowed, and their levels are the script's."""
    source = "import logging, warnings\nlogging.getLogger('timm').warning('log')\nwarnings.warn('warning')\n"
    source += "logging.getLogger('timm').setLevel(7)"
    level = logging.getLogger("timm").level
    try:
        with pytest.warns(UserWarning, match="^warning$"):
            script(source)
        assert caplog.messages == ["log"]
        assert logging.getLogger("timm").level == 7
    finally:
        logging.getLogger("timm").setLevel(level)


def test_a_script_that_is_not_there(capsys):
    """One line, exit status 2."""
    assert main(["run", "nowhere.py"]) == 2
    assert capsys.readouterr().err == "timm-resize run: error: nowhere.py: there is no such file.\n"


def test_after_a_script_models_have_their_own_size(script):
    """What a command line said is forgotten with the script."""
    script("import timm", "--img-size", 96)
    with timm_resize.install():
        model = timm.create_model(NAME, **TINY)
    assert model.patch_embed.img_size == (224, 224)
    assert model(image((224, 224))).shape == (1, 2)
