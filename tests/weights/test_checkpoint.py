"""Checkpoint files: nothing is half-loaded, whatever is wrong with them and whichever write fails."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

import timm_resize
import timm_resize.core.transaction
from tests.helpers.oracle import image, redraw_, stock
from timm_resize.weights.checkpoint import load_checkpoint

NAME = "vit_tiny_patch16_224"
SMALL = dict(depth=1, num_classes=2, embed_dim=48)


def vit(size, seed=0):
    return redraw_(stock(NAME, img_size=size, **SMALL), seed=seed)


def bits(thing):
    """Return everything that a model, an optimizer or a scaler holds, as values that stay."""
    return copy.deepcopy(thing.state_dict())


def same(a, b):
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


ODD = {
    "nothing": (lambda t: None, "pos_embed is a NoneType, not a tensor"),
    "text": (lambda t: "0.5", "pos_embed is a str, not a tensor"),
    "sparse": (lambda t: t.to_sparse(), "pos_embed is a sparse tensor"),
    "meta": (lambda t: t.to("meta"), "pos_embed has no values"),
    "integers": (lambda t: t.long(), "pos_embed is int64, not float32"),
    "beyond": (lambda t: t.double() + 1e300, "pos_embed holds numbers beyond float32"),
    "other shape": (lambda t: t[:, :, :7], r"pos_embed is (1, 37, 7), not (1, 37, 48)"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("way", ["load_checkpoint", "resume_checkpoint"])
def test_values_that_cannot_be_loaded_are_refused_before_anything_is(way, case, tmp_path):
    """Whatever stands in a tensor's place: an error that names it, and the model is as it was."""
    change, text = ODD[case]
    model, given = vit(96), vit(96, seed=3).state_dict()
    given["pos_embed"] = change(given["pos_embed"])
    torch.save({"state_dict": given, "epoch": 1}, tmp_path / "odd.pth")
    before = bits(model)
    load = load_checkpoint if way == "load_checkpoint" else timm_resize.resume_checkpoint
    with pytest.raises(timm_resize.CheckpointError, match=re.escape(text)):
        load(model, tmp_path / "odd.pth")
    assert same(bits(model), before)


@pytest.fixture
def training(tmp_path):
    """A file of timm's saver at 64, and a model, an optimizer, an average and a scaler at 96 that have lived."""
    old = vit(64).train()
    optimizer, ema, scaler = torch.optim.AdamW(old.parameters()), ModelEmaV3(old), NativeScaler("cpu")
    old(image((64, 64))).sum().backward()
    optimizer.step()
    saver = CheckpointSaver(
        old, optimizer, model_ema=ema, amp_scaler=scaler, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(3, 0.5)
    new = vit(96, seed=5).train()
    parts = (new, torch.optim.AdamW(new.parameters()), ModelEmaV3(new), NativeScaler("cpu"))
    new(image((96, 96))).sum().backward()
    parts[1].step()
    return tmp_path / "last.pth.tar", parts


@pytest.mark.parametrize("fail_at", range(4))
def test_a_resume_whose_write_fails_takes_back_the_others(fail_at, training, monkeypatch):
    """Model, average, optimizer, scaler: whichever load breaks, all are as they were; the next works."""
    file, (model, optimizer, ema, scaler) = training
    before = [bits(part) for part in (model, optimizer, ema, scaler)]
    states = {id(p): id(s) for p, s in optimizer.state.items()}
    left, write = [fail_at], timm_resize.core.transaction._write

    def failing(do):
        do()
        if not left[0]:
            raise MemoryError("injected")
        left[0] -= 1

    with monkeypatch.context() as patch:
        patch.setattr(timm_resize.core.transaction, "_write", failing)
        with pytest.raises(MemoryError, match="injected"):
            timm_resize.resume_checkpoint(model, file, optimizer, scaler, ema=ema)
    assert all(same(bits(part), old) for part, old in zip((model, optimizer, ema, scaler), before, strict=True))
    assert {id(p): id(s) for p, s in optimizer.state.items()} == states
    assert timm_resize.core.transaction._write is write
    assert timm_resize.resume_checkpoint(model, file, optimizer, scaler, ema=ema) == 4
    assert not same(bits(model), before[0])


def test_a_load_whose_copy_fails_takes_back_what_was_copied(tmp_path, monkeypatch):
    """`load_checkpoint` that breaks after it has copied leaves the model's bits, and the next call works."""
    model, other = vit(96), vit(64, seed=3)
    torch.save(other.state_dict(), tmp_path / "weights.pth")
    before = bits(model)

    def failing(do):
        do()
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(timm_resize.core.transaction, "_write", failing)
        with pytest.raises(MemoryError, match="injected"):
            load_checkpoint(model, tmp_path / "weights.pth")
    assert same(bits(model), before)
    load_checkpoint(model, tmp_path / "weights.pth")
    assert torch.equal(model.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(epoch=None), "has epoch=None, not a number"),
        (lambda c: c.update(epoch="3"), "has epoch='3', not a number"),
        (lambda c: c["state_dict"].pop("pos_embed"), "it lacks pos_embed"),
        (lambda c: c["state_dict"].update(extra=torch.zeros(1)), "the model has no extra"),
        (lambda c: c["state_dict_ema"].pop("norm.weight"), "it lacks norm.weight"),
        (
            lambda c: c["optimizer"]["param_groups"].append(c["optimizer"]["param_groups"][0]),
            "has groups of [20, 20] parameters, the optimizer of [20]",
        ),
    ],
)
def test_a_file_with_a_part_that_does_not_fit_changes_nothing(change, text, training):
    """A missing or extra tensor, another optimizer, no epoch: an error that says so, and all parts are as before."""
    file, (model, optimizer, ema, scaler) = training
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)
    before = [bits(part) for part in (model, optimizer, ema)]
    with pytest.raises(timm_resize.CheckpointError, match=re.escape(text)):
        timm_resize.resume_checkpoint(model, file, optimizer, scaler, ema=ema)
    assert all(same(bits(part), old) for part, old in zip((model, optimizer, ema), before, strict=True))


@pytest.mark.parametrize("prefix", ["model.", "module."])
def test_a_resume_takes_names_with_a_prefix(prefix, training):
    """What a program saved as `model.*` or `module.*` resumes as the plain names do."""
    file, (model, optimizer, ema, scaler) = training
    content = torch.load(file, weights_only=False)
    want = timm_resize.resize_state_dict(content["state_dict"], model)
    content["state_dict"] = {prefix + k: v for k, v in content["state_dict"].items()}
    torch.save(content, file)
    assert timm_resize.resume_checkpoint(model, file, optimizer, scaler, ema=ema) == 4
    assert same(bits(model), dict(want))


SWIN = dict(depths=(2, 2, 2, 2), embed_dim=16, num_heads=(1, 1, 1, 1))
TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(("size", "window"), [(160, 5), (320, 10), (384, 12)])
def test_a_swin_resized_in_place_opens_again(size, window, tmp_path):
    """Its windows are scaled, the constructor's are not: by every way its tables are read with the window they have."""
    saved = redraw_(timm.create_model("swin_tiny_patch4_window7_224", **SWIN))
    timm_resize.resize_(saved, size)
    assert saved.layers[0].blocks[0].window_size == (window, window)
    path = str(tmp_path / "swin.pth")
    torch.save(saved.state_dict(), path)
    again = redraw_(timm.create_model("swin_tiny_patch4_window7_224", **SWIN), seed=4)
    timm_resize.resize_(again, size)
    load_checkpoint(again, path)
    assert all(torch.equal(t, saved.state_dict()[k]) for k, t in again.state_dict().items())
    table = saved.state_dict()[TABLE]
    want = resize_rel_pos_bias_table(table, (7, 7), (13 * 13, 1))  # the constructor's window, by stock's function
    for at in (size, 224):
        built = timm_resize.create_model("swin_tiny_patch4_window7_224", img_size=at, checkpoint_path=path, **SWIN)
        torch.testing.assert_close(built.state_dict()[TABLE], want, rtol=0, atol=1e-5)
        fitted = timm_resize.resize_state_dict(saved.state_dict(), built)
        assert all(torch.equal(fitted[k], t) for k, t in built.state_dict().items())


@pytest.mark.parametrize("into", ["swin_base_patch4_window12_384", "swin_s3_tiny_224"])
def test_a_window_of_another_name_is_read_from_the_table(into):
    """Weights of window 7 into a model of other windows, per stage: stock's own resampling of each table."""
    args = dict(depths=(1, 1, 1, 1), embed_dim=16, num_heads=(1, 1, 1, 1))
    small = redraw_(timm.create_model("swin_tiny_patch4_window7_224", **args))
    large = timm.create_model(into, **args)
    out = timm_resize.resize_state_dict(small.state_dict(), large)
    for key, like in large.state_dict().items():
        if key.endswith("relative_position_bias_table"):
            side = int((like.shape[0] ** 0.5 + 1) / 2)
            want = resize_rel_pos_bias_table(small.state_dict()[key], (side, side), tuple(like.shape))
            torch.testing.assert_close(out[key], want, rtol=0, atol=1e-5)
    assert not large.load_state_dict(out).missing_keys
