"""Every optimizer through a resize, live and from state dicts of another size."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import nn

import timm_resize
from tests.helpers.examples import mostly_slow
from tests.helpers.oracle import image, redraw_, stock, tensors

NEED_MORE = ("bnb", "fused", "adahessian", "kron")  # other packages, a GPU, a second backward, a compiler
OPTIMIZERS = [name for name in list_optimizers() if not name.startswith(NEED_MORE)]
TORCH = {
    "Adafactor": getattr(torch.optim, "Adafactor", None),
    "Adam": torch.optim.Adam,
    "NAdam": torch.optim.NAdam,
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
    "Rprop": torch.optim.Rprop,
}


def small():
    """A redrawn narrow one-block ViT at 64 px in training mode."""
    return redraw_(stock("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=2, embed_dim=48)).train()


def train(model, optimizer, size, steps=2, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image(size, batch=4, seed=step)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()


def goes_on(model, optimizer, steps=3):
    """Train, resize up, down and non-square, train on: every parameter moves, none is NaN, identity is kept."""
    objects = dict(model.named_parameters())
    train(model, optimizer, (64, 64), steps=5)
    notes = []
    for size in ((96, 96), (48, 48), (64, 96)):
        notes += timm_resize.resize_(model, size, optimizer=optimizer).notes
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, optimizer, size, steps=max(steps, 5 if size == (64, 96) else 3))  # odd: signs alternate
        for n, p in model.named_parameters():
            assert p is objects[n]
            assert torch.isfinite(p).all(), n
            assert not torch.equal(p, before[n]), n
        for state in optimizer.state.values():
            for value in state.values():
                assert not isinstance(value, torch.Tensor) or torch.isfinite(value).all()
    return notes


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "adamw", "lion", *OPTIMIZERS[::8]))
def test_timms_optimizers(name):
    """Each optimizer that timm registers goes on; state that cannot follow is named in the plan's notes."""
    model = small()
    steps = 9 if name.startswith("c") else 3  # cautious ones leave a parameter alone while its gradient turns round
    notes = goes_on(model, create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.0), steps)
    assert bool(notes) == ("adafactor" in name)
    assert all("pos_embed starts afresh" in note for note in notes)


@pytest.mark.parametrize("name", [name for name, cls in TORCH.items() if cls])  # torch 2.4 has no Adafactor
def test_torchs_optimizers(name):
    """So do torch's own."""
    model = small()
    kwargs = {"momentum": 0.9} if name == "SGD" else {}
    assert bool(goes_on(model, TORCH[name](model.parameters(), lr=1e-3, **kwargs))) == (name == "Adafactor")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_torchs_muon():
    """Muon takes matrices alone; its momentum of a resampled matrix follows."""
    model = redraw_(stock("resmlp_12_224", img_size=64, num_classes=2)).train()
    muon = torch.optim.Muon([block.linear_tokens.weight for block in model.blocks], lr=1e-3)  # large ones take minutes
    train(model, muon, (64, 64))
    timm_resize.resize_(model, 96, optimizer=muon)
    weight = model.blocks[0].linear_tokens.weight
    assert muon.state[weight]["momentum_buffer"].shape == weight.shape == (36, 36)
    before = weight.detach().clone()
    train(model, muon, (96, 96))
    assert torch.isfinite(weight).all()
    assert not torch.equal(weight, before)


def test_mixed_precision_and_accumulation():
    """Under autocast with a scaler, half-accumulated gradients are resampled on demand, or cleared."""
    for grad in ("resample", "clear"):
        model = small()
        optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.amp.GradScaler("cpu")

        def backward(size, model=model, scaler=scaler):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(image(size, batch=2)), torch.tensor([0, 1]))
            scaler.scale(loss).backward()

        backward((64, 64))
        pending = model.pos_embed.grad.clone()
        timm_resize.resize_(model, 96, optimizer=optimizer, grad=grad)
        if grad == "resample":
            want = resample_abs_pos_embed(pending, [6, 6], [4, 4], num_prefix_tokens=1)
            torch.testing.assert_close(model.pos_embed.grad, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
        else:
            assert model.pos_embed.grad is None
        backward((96, 96))
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(timm_resize.ResizeError, match="grad='keep' is not known. Use 'clear' or 'resample'"):
        timm_resize.resize_(model, 64, grad="keep")


@pytest.mark.parametrize("name", ["momentum", "adamw", "lamb", "adafactor"])
def test_resuming_at_another_size_is_resizing_live(name, tmp_path):
    """A file of timm's CheckpointSaver, resumed at another size: the tensors of a live resize, in all three parts."""
    model = small()
    optimizer = create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.0)
    ema, scaler, again_scaler = ModelEmaV3(model, decay=0.5), NativeScaler("cpu"), NativeScaler("cpu")
    scaler.load_state_dict({**scaler.state_dict(), "scale": 512.0})
    train(model, optimizer, (64, 64))
    ema.update(model)
    saver = CheckpointSaver(
        model, optimizer, model_ema=ema, amp_scaler=scaler, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(3, 0.5)
    file = tmp_path / "last.pth.tar"
    fresh = stock("vit_tiny_patch16_224", img_size=(96, 64), depth=1, num_classes=2, embed_dim=48).train()
    again, average = create_optimizer_v2(fresh, opt=name, lr=1.0, weight_decay=0.0), ModelEmaV3(fresh)
    assert timm_resize.resume_checkpoint(fresh, file, again, again_scaler, ema=average, source=64) == 4
    assert again_scaler.state_dict()["scale"] == 512.0
    timm_resize.resize_(model, (96, 64), optimizer=optimizer, ema=ema)
    for got, want in ((fresh, model), (average.module, ema.module)):
        assert all(torch.equal(t, tensors(want)[n]) for n, t in tensors(got).items())
    assert again.param_groups[0]["lr"] == 1e-2
    for ours, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
        a, b = again.state.get(ours, {}), optimizer.state.get(theirs, {})
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b[k])) for k, v in a.items())
    train(fresh, again, (96, 64))
    train(model, optimizer, (96, 64))
    assert all(torch.equal(t, tensors(model)[n]) for n, t in tensors(fresh).items())


def test_bad_checkpoints_change_nothing(tmp_path):
    """A file that is none, that lacks a part, an optimizer of other parameters: an error, and all is as before."""
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, (64, 64))
    before = {n: t.clone() for n, t in tensors(model).items()}
    (tmp_path / "broken").write_bytes(b"no checkpoint")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights")
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "both")
    for file, kwargs, text in (
        ("missing", {}, "cannot be read"),
        ("broken", {}, "cannot be read"),
        ("weights", {"optimizer": optimizer}, "has no 'optimizer'. Leave it out"),
        ("both", {"ema": copy.deepcopy(model)}, "has no 'state_dict_ema'. Leave it out"),
        ("both", {"optimizer": torch.optim.Adam([model.pos_embed])}, r"has groups of \[20\] parameters, th"),
    ):
        with pytest.raises(timm_resize.CheckpointError, match=text):
            timm_resize.resume_checkpoint(model, tmp_path / file, **kwargs)
        assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())


def test_factored_state_does_not_tell_its_size():
    """Rows and columns fit many sizes: the size is asked for; a size that is no checkpoint's is an error."""
    model = small()
    optimizer = create_optimizer_v2(model, opt="adafactor", lr=1e-2, weight_decay=0.0)
    train(model, optimizer, (64, 64))
    state = optimizer.state_dict()
    with pytest.raises(timm_resize.CheckpointError, match="is factored, which does not tell its image size"):
        timm_resize.resize_optimizer_state_dict(state, optimizer, model)
    timm_resize.resize_(model, 96)
    fitted = timm_resize.resize_optimizer_state_dict(state, optimizer, model, source=64)
    index = [id(p) for p in model.parameters()].index(id(model.pos_embed))
    assert fitted["state"].keys() == state["state"].keys() - {index}


def test_groups_and_freezing():
    """What a resize touched gets a rate of its own, or is all that trains; what was frozen stays frozen."""
    model = timm.create_model("levit_128s", num_classes=2)
    frozen = {"head.linear.weight", "stages.0.blocks.0.attn.attention_biases"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    plan = timm_resize.resize_(model, 256)
    tables = {n for n, _ in model.named_parameters() if n.endswith("attention_biases") and "stages.2.blocks" not in n}
    tables -= frozen
    groups = timm_resize.param_groups(model, plan, lr=1e-4, resized_lr=1e-2, weight_decay=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in groups[0]["params"]} == tables
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-2, 0.1), (1e-4, 0.1)]
    assert sum(len(g["params"]) for g in groups) == len(names) - len(frozen)
    assert timm_resize.freeze_unresized_(model, plan) == len(tables)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == tables


def test_an_optimizer_of_another_model_is_refused():
    """So is what is no optimizer: an error that says what it is, and nothing has changed."""
    model, other = small(), small()
    before = {n: t.clone() for n, t in tensors(model).items()}
    with pytest.raises(timm_resize.ResizeError, match="optimizer=AdamW holds none of the model's parameters"):
        timm_resize.resize_(model, 96, optimizer=torch.optim.AdamW(other.parameters()))
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=1.0), 1)
    for thing, name in ((scheduler, "StepLR"), (next(model.parameters()), "Parameter")):
        with pytest.raises(timm_resize.ResizeError, match=f"optimizer={name} is not an optimizer"):
            timm_resize.resize_(model, 96, optimizer=thing)
    assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())


def by_name(model, order):
    """An AdamW over named parameters in this order, after two steps."""
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([(name, named[name]) for name in order], lr=1e-3)
    train(model, optimizer, tuple(model.patch_embed.img_size))
    return optimizer


def test_states_by_name():
    """Names in a state dict, with a program's prefix and in another order, say whose each state is."""
    saved, target = small(), small()
    timm_resize.resize_(target, 96)
    names = [name for name, _ in saved.named_parameters()]
    state = by_name(saved, names[::-1]).state_dict()
    if "param_names" not in state["param_groups"][0]:
        pytest.skip("torch before 2.6 keeps no names")
    state["param_groups"][0]["param_names"] = [f"module.net.{n}" for n in state["param_groups"][0]["param_names"]]
    optimizer = by_name(target, names)
    optimizer.load_state_dict(timm_resize.resize_optimizer_state_dict(state, optimizer, target))
    theirs = dict(zip(names[::-1], (state["state"][i] for i in range(len(names))), strict=True))
    for name, parameter in target.named_parameters():
        want = theirs[name]["exp_avg"]
        if name == "pos_embed":
            want = resample_abs_pos_embed(want, (6, 6), num_prefix_tokens=1)
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], want)


def test_states_keyed_by_name():
    """A state dict of torch's distributed checkpoints, whose keys are names, keeps them."""
    saved, target = small(), small()
    timm_resize.resize_(target, 96)
    names = [name for name, _ in saved.named_parameters()]
    plain = by_name(saved, names).state_dict()
    keyed = {"state": dict(zip(names, plain["state"].values(), strict=True))}
    keyed["param_groups"] = [{"lr": 1e-3, "params": names[::-1]}]
    fitted = timm_resize.resize_optimizer_state_dict(keyed, by_name(target, names), target)
    assert fitted["state"]["cls_token"] is keyed["state"]["cls_token"]
    assert fitted["state"]["pos_embed"]["exp_avg"].shape == target.pos_embed.shape


def test_states_of_other_names():
    """Names that the optimizer has not are refused, not taken in order."""
    model = small()
    names = [name for name, _ in model.named_parameters()]
    state = by_name(model, names[1:]).state_dict()
    with pytest.raises(timm_resize.CheckpointError, match="VisionTransformer: the optimizer state has no cls_token in"):
        timm_resize.resize_optimizer_state_dict(state, by_name(model, names[:-1]), model)
