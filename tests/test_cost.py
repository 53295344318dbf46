"""Tokens, operations and attention scores against formulas worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import timm_resize
from tests.helpers.oracle import stock
from timm_resize.cost import Cost, before_and_after, measure, table


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return stock(name, **kwargs)


def vit_tiny_products(size, dim=192, heads=3, depth=12, classes=1000):
    """Return (tokens, flops, scores of one layer) of ViT-Tiny/16: two flops for each multiply-add."""
    patches = (size // 16) ** 2
    tokens = patches + 1
    head_dim = dim // heads
    embed = patches * (3 * 16 * 16) * dim
    qkv_and_proj = tokens * dim * 3 * dim + tokens * dim * dim
    scores_and_values = 2 * heads * tokens * tokens * head_dim
    mlp = 2 * tokens * dim * 4 * dim
    products = embed + depth * (qkv_and_proj + scores_and_values + mlp) + dim * classes
    return tokens, 2 * products, heads * tokens * tokens


@pytest.mark.parametrize("size", [224, 384])
def test_vit_tiny_by_hand(size):
    """FLOPs, tokens and attention scores of ViT-Tiny equal the formula, built there or resized to it."""
    tokens, flops, scores = vit_tiny_products(size)
    resized = on_meta("vit_tiny_patch16_224")
    timm_resize.resize_(resized, size)
    for model in (on_meta("vit_tiny_patch16_224", img_size=size), resized):
        cost = measure(model)
        assert cost == Cost((size, size), (tokens,), flops, cost.parameters, (scores,) * 12)
        assert cost.parameters == sum(p.numel() for p in model.parameters())


def test_kernels_count_alike():
    """A fused attention kernel counts as the explicit softmax does, scores and FLOPs."""
    fused, plain = on_meta("vit_tiny_patch16_224", depth=2), on_meta("vit_tiny_patch16_224", depth=2)
    for block in fused.blocks:
        block.attn.fused_attn = True
    for block in plain.blocks:
        block.attn.fused_attn = False
    assert measure(fused) == measure(plain)


class Gated(nn.Module):
    """Attention over 6 tokens whose scores are cast, gated, dropped out and laid out anew before they are used."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x):
        tokens = x.flatten(2).reshape(1, 2, 6, -1)
        scores = (tokens @ tokens.mT).softmax(-1, dtype=torch.float64).to(x.dtype) * self.gate
        scores = nn.functional.dropout(scores, 0.5, training=True).transpose(1, 2).contiguous().transpose(1, 2)
        return scores.reshape(2, 6, 6) @ tokens.reshape(2, 6, -1), tokens.softmax(-1).sum()


def test_scores_are_followed_to_their_product():
    """Scores count once though copies of them are used; a softmax whose result meets no product does not."""
    assert measure(Gated(), (4, 8)).attention == (2 * 6 * 6,)


def test_windows_count_all():
    """Swin's scores of a layer are those of all its windows: windows x heads x area^2."""
    cost = measure(on_meta("swin_tiny_patch4_window7_224"))
    stages = [(2, 64, 3), (2, 16, 6), (6, 4, 12), (2, 1, 24)]  # blocks, windows, heads
    assert cost.attention == tuple(w * h * 49**2 for blocks, w, h in stages for _ in range(blocks))
    assert cost.tokens == (56**2, 28**2, 14**2, 7**2)


@pytest.mark.parametrize("name", ["resnet18", "skresnet18", "resnest14d"])
def test_no_attention(name):
    """A softmax over branches is no attention: none is reported, and the table says '-'."""
    cost = measure(on_meta(name))
    assert cost.attention == ()
    assert [line.split()[-3:] for line in table(cost, cost).splitlines()[-4:]] == [["-", "-", "-"]] * 4


def test_resnet18_by_hand():
    """ResNet-18's operations are those of its convolutions and classifier at any size, here 64x96."""
    layers = [(3, 64, 7, 2)]  # in, out, kernel, total stride of the output
    for width, before, stride in ((64, 64, 4), (128, 64, 8), (256, 128, 16), (512, 256, 32)):
        layers += [(before, width, 3, stride), *[(width, width, 3, stride)] * 3]
        layers += [(before, width, 1, stride)] if before != width else []
    products = sum(i * o * k * k * (64 // s) * (96 // s) for i, o, k, s in layers) + 512 * 1000
    assert measure(on_meta("resnet18"), (64, 96)).flops == 2 * products


def test_reads_only():
    """Measuring leaves mode, parameters and hooks alone, and does not depend on the device."""
    model = stock("vit_tiny_patch16_224", depth=1).train()
    before = {n: (p, p.requires_grad, p.device) for n, p in model.named_parameters()}
    cost = measure(model)
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert {n: (p, p.requires_grad, p.device) for n, p in model.named_parameters()} == before
    assert cost == measure(on_meta("vit_tiny_patch16_224", depth=1))


def test_parameters_as_inputs():
    """Models that hand a parameter to a layer, as CaiT its class token, can be measured."""
    cost = measure(on_meta("cait_xxs24_224", depth=1))
    assert cost.attention[0] == 4 * 196**2


def test_size_that_does_not_run():
    """A size that the model's forward refuses is an error with the forward's own words."""
    model = on_meta("vit_tiny_patch16_224", depth=1)
    with pytest.raises(
        timm_resize.ResizeError,
        match=r"^VisionTransformer: img_size=\(256, 256\) cannot be measured.*"
        r"doesn't match model",
    ):
        measure(model, 256)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("full"), MemoryError("full")])
def test_memory_that_runs_out_is_not_a_wrong_size(error):
    """It passes as it is."""
    model = on_meta("vit_tiny_patch16_224", depth=1)

    def fail(*_):
        raise error

    model.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(type(error), match="full") as caught:
        measure(model)
    assert caught.value is error


def test_table_text():
    """The table sets both sides beside their ratio, with two bytes a score in half precision."""
    a = Cost((224, 224), (3136, 784), 2_000_000_000, 5_000_000, (2**20, 2**18))
    b = Cost((224, 448), (6272, 1568), 5_000_000_000, 5_100_000, (2**22, 2**19))
    assert table(a, b).splitlines() == [
        "                                        224x224     224x448  ratio",
        "tokens                                3136, 784  6272, 1568   2.00",
        "parameters (M)                             5.00        5.10   1.02",
        "GFLOPs (2 per multiply-add)                2.00        5.00   2.50",
        "GMACs (multiply-adds)                      1.00        2.50   2.50",
        "attention scores, largest (MiB fp32)       4.00       16.00   4.00",
        "attention scores, largest (MiB half)       2.00        8.00   4.00",
        "attention scores, total (MiB fp32)         5.00       18.00   3.60",
        "attention scores, total (MiB half)         2.50        9.00   3.60",
    ]


def test_what_a_plan_costs():
    """Both sides by the formula, from a plan that is not applied; a stale plan is refused."""
    model = on_meta("vit_tiny_patch16_224")
    plan = timm_resize.plan_resize(model, 384)
    for cost, size in zip(before_and_after(model, plan), (224, 384), strict=True):
        tokens, flops, scores = vit_tiny_products(size)
        assert (cost.img_size, cost.tokens, cost.flops) == ((size, size), (tokens,), flops)
        assert cost.attention == (scores,) * 12
    assert model.pos_embed.shape == (1, 197, 192)
    timm_resize.resize_(model, plan)
    with pytest.raises(timm_resize.StalePlanError):
        before_and_after(model, plan)
