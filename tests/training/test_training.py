"""Optimizers, EMA copies and gradients through a resize."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_resize
import timm_resize.core.transaction
from tests.helpers.oracle import image, redraw_, stock, tensors


def small():
    """A redrawn one-block ViT at 64 px in training mode."""
    return redraw_(stock("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=2)).train()


def train(model, optimizer, size, steps=3):
    """Train on seeded noise."""
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image(size, batch=4, seed=step)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()


def test_momentum_is_the_one_that_resampled_gradients_build():
    """SGD: resizing the momentum equals the momentum of the resampled gradients, since the map is linear."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    gradients = []
    for step in range(4):
        optimizer.zero_grad()
        model(image((64, 64), batch=2, seed=step)).square().mean().backward()
        gradients.append(model.pos_embed.grad.clone())
        optimizer.step()
    timm_resize.resize_(model, 96, optimizer=optimizer)
    want = torch.zeros_like(model.pos_embed)
    for gradient in gradients:
        want = 0.9 * want + resample_abs_pos_embed(gradient, [6, 6], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(optimizer.state[model.pos_embed]["momentum_buffer"], want, atol=1e-5, rtol=1e-5)


def test_second_moments_stay_non_negative_and_bound_the_first():
    """Adam: after growing and shrinking, v >= m² still holds where it held, so no step explodes."""
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.0))  # m = g, v = g²
    train(model, optimizer, (64, 64), steps=1)
    for size in (96, 40):
        timm_resize.resize_(model, size, optimizer=optimizer)
        state = optimizer.state[model.pos_embed]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == model.pos_embed.shape
        assert (state["exp_avg_sq"] >= 0).all()
        assert (state["exp_avg_sq"] * (1 + 1e-5) + 1e-12 >= state["exp_avg"].square()).all()


def test_a_failure_in_the_optimizer_part_leaves_the_model_too(monkeypatch):
    """An exception at any write, the optimizer's included, leaves model, gradients and optimizer as they were."""
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, (64, 64))
    pending = {n: p.grad for n, p in model.named_parameters()}
    assert pending["pos_embed"] is not None
    state = copy.deepcopy(optimizer.state_dict())
    before = {n: t.clone() for n, t in tensors(model).items()}
    calls = {"n": 0, "fail": -1}

    def write(do):
        calls["n"] += 1
        if calls["n"] == calls["fail"]:
            raise RuntimeError("injected")
        do()

    monkeypatch.setattr(timm_resize.core.transaction, "_write", write)
    duplicate, duplicate_optimizer = copy.deepcopy((model, optimizer))
    timm_resize.resize_(duplicate, 96, optimizer=duplicate_optimizer)
    total = calls["n"]
    for fail in range(1, total + 1):
        calls.update(n=0, fail=fail)
        with pytest.raises(RuntimeError, match="injected"):
            timm_resize.resize_(model, 96, optimizer=optimizer)
        assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())
        assert all(p.grad is pending[n] for n, p in model.named_parameters())
        now = optimizer.state_dict()["state"]
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(now[i][k]))
            for i, s in state["state"].items()
            for k, v in s.items()
        )


@pytest.mark.parametrize("wrap", [ModelEmaV2, ModelEmaV3, AveragedModel, copy.deepcopy])
def test_ema_copies_follow(wrap):
    """Each kind of EMA copy is resized by the same call, equal to resizing it alone, and still updates."""
    model = small()
    ema = wrap(model)
    inner = getattr(ema, "module", ema)
    with torch.no_grad():
        inner.pos_embed.add_(1.0)
    alone = copy.deepcopy(inner)
    timm_resize.resize_(model, 96, ema=ema)
    timm_resize.resize_(alone, 96)
    assert all(torch.equal(t, tensors(alone)[n]) for n, t in tensors(inner).items())
    if hasattr(ema, "update"):
        ema.update(model)


def test_an_ema_of_another_size_is_refused():
    """An EMA copy that missed a resize is an error, and the model is not resized either."""
    model = small()
    ema = copy.deepcopy(model)
    timm_resize.resize_(model, 96)
    with pytest.raises(timm_resize.ResizeError, match="Give the EMA copy of this model, made at its present size"):
        timm_resize.resize_(model, 128, ema=ema)
    assert timm_resize.plan_resize(model).new_size == (96, 96)


def test_training_in_between_starts_a_new_chain():
    """A tensor that training moved is resampled from where it is now; stock's method gives the same."""
    model = small()
    timm_resize.resize_(model, 96)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), (96, 96), steps=1)
    theirs = copy.deepcopy(model)
    timm_resize.resize_(model, 64)
    theirs.set_input_size((64, 64))
    torch.testing.assert_close(model.pos_embed, theirs.pos_embed, atol=1e-5, rtol=0)


def test_an_untouched_chain_survives_a_change_of_dtype():
    """Resize, cast to bfloat16, resize back: the original, cast; nothing was rounded twice."""
    model = small()
    want = model.pos_embed.detach().bfloat16()
    timm_resize.resize_(model, 96)
    model.bfloat16()
    timm_resize.resize_(model, 64)
    assert torch.equal(model.pos_embed, want)


def test_a_live_graph_does_not_stop_the_next_backward():
    """A loss kept from before the resize holds autograd's old shape; training goes on all the same."""
    model = small()
    kept = model(image((64, 64))).sum()
    timm_resize.resize_(model, 96)
    model(image((96, 96))).sum().backward()
    assert model.pos_embed.grad.shape == model.pos_embed.shape
    del kept


def test_hooks_ties_and_memory_format_survive():
    """A tensor hook still fires, a tied parameter stays tied, channels-last weights stay channels-last."""
    model = small()
    model.tied = nn.Module()
    model.tied.weight = model.pos_embed
    model.to(memory_format=torch.channels_last)
    fired = []
    model.pos_embed.register_hook(lambda g: fired.append(g.shape))
    timm_resize.resize_(model, 96, patch_size=8)
    assert model.tied.weight is model.pos_embed
    assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.patch_embed.proj.weight.is_contiguous()
    model(image((96, 96))).sum().backward()
    assert fired == [torch.Size([1, 145, 192])]


def test_a_resize_in_inference_mode_leaves_a_model_that_trains():
    """Parameters written under `torch.inference_mode` are ordinary tensors: the next backward works."""
    model = small()
    with torch.inference_mode():
        timm_resize.resize_(model, 96)
    model(image((96, 96))).sum().backward()
    assert model.pos_embed.grad is not None


def test_plans_pickle():
    """A plan, one that empties a cache too, survives pickle and still applies."""
    for model in (small(), stock("levit_128s", depth=(1, 1, 1))):
        plan = pickle.loads(pickle.dumps(timm_resize.plan_resize(model, 128)))
        assert timm_resize.resize_(model, plan).new_size == (128, 128)
        assert timm_resize.plan_resize(model).new_size == (128, 128)
