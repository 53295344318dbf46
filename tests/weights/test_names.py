"""A model's tensors in a state dict, whatever stands before their names and beside them."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_resize
from tests.helpers.oracle import redraw_, stock
from timm_resize.weights.checkpoint import load_checkpoint

NAME = "vit_tiny_patch16_224"


def vit(size=224, **kwargs):
    return redraw_(stock(NAME, img_size=size, depth=1, num_classes=3, **kwargs))


def expected(model, size):
    """Return stock's own resampling of a ViT's tensors, computed by timm's function on the position embedding alone."""
    out = dict(model.state_dict())
    grid = (size[0] // 16, size[1] // 16)
    old = model.patch_embed.grid_size
    out["pos_embed"] = resample_abs_pos_embed(out["pos_embed"], list(grid), list(old), num_prefix_tokens=1)
    return out


class Holder(nn.Module):
    """As a Lightning module, a detector or a CLIP holds its model, at any dotted path, with something beside it."""

    def __init__(self, model, path):
        super().__init__()
        self.proto = nn.Parameter(torch.arange(3.0))
        owner = self
        *way, last = path.split(".")
        for name in way:
            owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.add_module(last, model)


@pytest.mark.parametrize("path", ["net", "model", "module", "backbone", "visual.trunk", "a.b.c"])
def test_a_holders_state_dict_keeps_its_names(path):
    """The model's tensors are fitted under the names that came in, everything else is the same object."""
    small, large = vit(224), Holder(vit((160, 256)), path)
    given = Holder(small, path).state_dict()
    out = timm_resize.resize_state_dict(given, large)
    assert out.keys() == given.keys()
    assert out["proto"] is given["proto"]
    for name, want in expected(small, (160, 256)).items():
        torch.testing.assert_close(out[f"{path}.{name}"], want, rtol=0, atol=1e-5)
    assert not large.load_state_dict(out).missing_keys


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: f"module.{k}",
        lambda k: f"_orig_mod.module.{k}",
        lambda k: k.replace("blocks.0.", "blocks.0._orig_mod."),
        lambda k: f"_fsdp_wrapped_module.{k.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.')}",
    ],
)
def test_parts_of_wrappers_that_the_model_has_not_go(rename):
    """Names with DDP's, compile's, FSDP's and checkpointing's parts, and an average's counter: the model loads them."""
    small, large = vit(224), vit(96)
    given = {"n_averaged": torch.tensor(3), **{rename(k): v for k, v in small.state_dict().items()}}
    out = timm_resize.resize_state_dict(given, large)
    assert not large.load_state_dict(out).missing_keys
    torch.testing.assert_close(out["pos_embed"], expected(small, (96, 96))["pos_embed"], rtol=0, atol=1e-5)


def test_an_averages_counter_stays_for_an_average():
    """An average of one size into an average of another: its entries and its count; the plain model has none."""
    small, large = AveragedModel(vit(224)), AveragedModel(vit(96))
    small.n_averaged += 7
    large.load_state_dict(timm_resize.resize_state_dict(small.state_dict(), large))
    assert large.n_averaged == 7
    assert "n_averaged" not in timm_resize.resize_state_dict(small.state_dict(), vit(96))


def test_parts_of_wrappers_in_the_middle():
    """A compiled model in a holder, into the plain one: what else the holder has goes along."""
    given = {f"net._orig_mod.{k}": v for k, v in vit(224).state_dict().items()} | {"proto": torch.zeros(3)}
    holder = Holder(vit(96), "net")
    assert not holder.load_state_dict(timm_resize.resize_state_dict(given, holder)).missing_keys
    plain = timm_resize.resize_state_dict(given, vit(96))  # not at the same place: as they came in
    assert plain.keys() == given.keys()


def test_a_part_of_the_model_is_fitted_alone():
    """One tensor by its name is enough to be known."""
    out = timm_resize.resize_state_dict({"pos_embed": vit(224).pos_embed.detach()}, vit(96))
    assert {k: tuple(v.shape) for k, v in out.items()} == {"pos_embed": (1, 37, 192)}


REFUSED = {
    "nothing": ({}, "the state dict is empty"),
    "foreign": ({"foo": torch.zeros(2)}, "first key is 'foo', this one's is 'cls_token'"),
    "container": (
        {"state_dict": {"pos_embed": torch.zeros(1)}, "epoch": 3},
        "Give one of them, e.g. checkpoint['state_dict']",
    ),
    "architecture": ("resnet18", "first key is 'conv1.weight'"),
    "two": ("two", r"student.* and teacher.*"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_this_models_is_refused(case):
    """The error names the first key, or the parts that fit as well, and what to write."""
    given, text = REFUSED[case]
    if given == "resnet18":
        given = stock("resnet18").state_dict()
    elif given == "two":
        given = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in vit(224).state_dict().items()}
    with pytest.raises(timm_resize.CheckpointError, match=re.escape(text)):
        timm_resize.resize_state_dict(given, vit(96))


def test_of_two_parts_the_models_path_decides():
    """A student and a teacher in one state dict: for the holder of the student alone, the student's."""
    student, teacher = vit(224), redraw_(stock(NAME, depth=1, num_classes=3), seed=5)
    given = {
        f"{who}.{k}": v for who, m in (("student", student), ("teacher", teacher)) for k, v in m.state_dict().items()
    }
    out = timm_resize.resize_state_dict(given, Holder(vit(96), "student"))
    torch.testing.assert_close(out["student.pos_embed"], expected(student, (96, 96))["pos_embed"], rtol=0, atol=1e-5)
    assert out["teacher.pos_embed"] is given["teacher.pos_embed"]


def test_a_source_that_is_the_models_own_size_is_checked():
    """`source=` equal to the model's size with tensors of another is an error, not a copy."""
    with pytest.raises(timm_resize.CheckpointError, match=r"not of source=\(96, 96\): pos_embed is \(1, 197, 192\)"):
        timm_resize.resize_state_dict(vit(224).state_dict(), vit(96), source=96)


def old_swin(state_dict):
    """Name a Swin's tensors as timm 0.6 did."""
    names = {
        k: re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k) for k in state_dict
    }
    return {names[k].replace("head.fc.", "head."): v for k, v in state_dict.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_names_of_older_timm_are_renamed_by_stocks_filter(prefix):
    """A Swin's file of timm 0.6 gives, by the names of today, what the file of today's names gives."""
    args = dict(depths=(1, 1, 1, 1), embed_dim=16, num_heads=(1, 1, 1, 1))
    small = redraw_(stock("swin_tiny_patch4_window7_224", **args))
    large = timm_resize.create_model("swin_tiny_patch4_window7_224", img_size=256, **args)
    now = small.state_dict()
    out = timm_resize.resize_state_dict({prefix + k: v for k, v in old_swin(now).items()}, large)
    there = "" if prefix == "module." else prefix  # DDP's part goes where the model has none
    assert out.keys() == {there + k for k in large.state_dict()}
    assert all(torch.equal(out[there + k], now[k]) for k in now if "bias_table" not in k)


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "teacher.backbone."])
@pytest.mark.parametrize("way", ["load_checkpoint", "checkpoint_path", "overlay", "container"])
def test_files_with_prefixes_give_the_same_tensors_by_every_way(way, prefix, tmp_path):
    """A file whose names have a prefix, with something beside the model: bit-equal to the plain file's tensors."""
    small = vit(224)
    beside = {"proto": torch.zeros(3)} if prefix.strip(".") not in ("", "module") else {}
    tensors = {**{prefix + k: v for k, v in small.state_dict().items()}, **beside}
    args = dict(depth=1, num_classes=3, img_size=(160, 256))
    path = str(tmp_path / "weights.pth")
    torch.save({"model_state_dict": tensors, "epoch": 3} if way == "container" else tensors, path)
    want = timm_resize.resize_state_dict(small.state_dict(), vit((160, 256)))
    if way == "checkpoint_path":
        got = timm_resize.create_model(NAME, checkpoint_path=path, **args)
    elif way == "overlay":
        overlay = {"file": path, "num_classes": 3}
        got = timm_resize.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    else:
        got = vit((160, 256))
        load_checkpoint(got, path)
    assert all(torch.equal(v, want[k]) for k, v in got.state_dict().items())


def test_a_holders_file_is_loaded_into_all_of_it(tmp_path):
    """`load_checkpoint` of a holder loads what is beside the model too, and refuses a file that lacks it."""
    given = Holder(vit(224), "net").state_dict()
    given["proto"] = torch.tensor([7.0, 8.0, 9.0])
    torch.save(given, tmp_path / "whole.pth")
    holder = Holder(vit(96), "net")
    load_checkpoint(holder, tmp_path / "whole.pth")
    assert holder.proto.tolist() == [7.0, 8.0, 9.0]
    del given["proto"]
    torch.save(given, tmp_path / "part.pth")
    with pytest.raises(timm_resize.CheckpointError, match="it lacks proto"):
        load_checkpoint(holder, tmp_path / "part.pth")


FOREIGN = {
    "other names": (
        lambda sd: {f"foo{k}": v for k, v in sd.items()},
        "has none of the model's tensors: its first is 'foo",
    ),
    "no position embedding": (lambda sd: {k: v for k, v in sd.items() if k != "pos_embed"}, "it lacks pos_embed"),
    "a block is missing": (lambda sd: {k: v for k, v in sd.items() if "blocks.0" not in k}, "it lacks blocks.0."),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_that_gives_too_little_is_refused_where_stock_is_not_strict(case, tmp_path):
    """With another number of classes stock loads what it finds, and only logs."""
    change, text = FOREIGN[case]
    save_file(change(stock(NAME, depth=1).state_dict()), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    with pytest.raises(timm_resize.CheckpointError, match=re.escape(text)):
        timm_resize.create_model(
            NAME, pretrained=True, num_classes=3, depth=1, img_size=(384, 256), pretrained_cfg_overlay=overlay
        )


def test_what_stock_rightly_leaves_fresh_is_named_once(tmp_path):
    """A new classifier and a norm after a changed pool are warned of in one sentence, and all else is the file's."""
    small = redraw_(stock(NAME, depth=1))
    save_file(small.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = timm_resize.create_model(
            NAME,
            pretrained=True,
            num_classes=3,
            depth=1,
            img_size=96,
            global_pool="avg",
            pretrained_cfg_overlay=overlay,
        )
    texts = [str(w.message) for w in seen]
    lacking = "fc_norm.weight, fc_norm.bias, head.weight, head.bias"
    assert texts == [f"VisionTransformer: not in the checkpoint, left as initialised: {lacking}."]
    assert torch.equal(model.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("way", ["load_checkpoint", "checkpoint_path", "overlay"])
def test_source_size_says_what_the_shapes_cannot(way, tmp_path):
    """A file saved at (128, 512) into (160, 640): refused without `source_size`, right with it, by stock's function."""
    small = vit((128, 512))
    path = str(tmp_path / "weights.pth")
    torch.save(small.state_dict(), path)
    args = dict(depth=1, num_classes=3, img_size=(160, 640))

    def get(**given):
        if way == "load_checkpoint":
            model = vit((160, 640))
            load_checkpoint(model, path, **given)
            return model
        how = (
            {"checkpoint_path": path}
            if way == "checkpoint_path"
            else {"pretrained": True, "pretrained_cfg_overlay": {"file": path, "num_classes": 3}}
        )
        return timm_resize.create_model(NAME, **args, **how, **given)

    if way != "overlay":
        with pytest.raises(timm_resize.CheckpointError, match=r"Give source_size=\(height, width\)"):
            get()
    got = get(source_size=(128, 512)).pos_embed
    torch.testing.assert_close(got.detach(), expected(small, (160, 640))["pos_embed"], rtol=0, atol=1e-5)
    with pytest.raises(timm_resize.CheckpointError, match=r"source_size=\(96, 96\)"):
        get(source_size=96)


def test_a_record_that_contradicts_what_is_given_is_an_error(tmp_path):
    """A file of ours that was saved at 96 is not opened as one of 160; timm's own arguments count as a record too."""
    model = timm_resize.create_model(NAME, img_size=96, depth=1, num_classes=3)
    timm_resize.save_pretrained(model, tmp_path)
    with pytest.raises(timm_resize.CheckpointError, match=r"source_size=\(160, 160\) is not .* records: \(96, 96\)"):
        load_checkpoint(vit(224), tmp_path / "model.safetensors", source_size=160)
    for args in ({"img_size": 160}, {"input_size": (3, 128, 512)}, {"model_kwargs": {"img_size": (128, 512)}}):
        wide = isinstance(args.get("img_size"), type(None))
        small = vit((128, 512) if wide else 160)
        torch.save({"state_dict": small.state_dict(), "args": args}, tmp_path / "train.pth")
        got = vit((160, 640))
        load_checkpoint(got, tmp_path / "train.pth")
        want = expected(small, (160, 640))["pos_embed"]
        torch.testing.assert_close(got.pos_embed.detach(), want, rtol=0, atol=1e-5)
