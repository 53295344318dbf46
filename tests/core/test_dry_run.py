"""Models with modules in them that no handler was written for: tried without values, right or refused by their name."""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import timm
import torch
from torch import nn

import timm_resize
from tests.helpers.oracle import first, image
from timm_resize.core.dry_run import strangers
from timm_resize.core.find import walk
from timm_resize.resample import token_matrix

SIZE = (96, 160)


@pytest.fixture(scope="module")
def stock_vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3).eval()


@pytest.fixture
def vit(stock_vit):
    return copy.deepcopy(stock_vit)


class Around(nn.Module):
    """Does nothing but hold a layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class PerToken(nn.Module):
    """Has a weight for each token."""

    def __init__(self, tokens):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(tokens, 1))

    def forward(self, x):
        return x * self.scale


class Sliced(nn.Linear):
    """A subclass that counts on as many tokens as there are now."""

    def forward(self, x):
        return super().forward(x) + torch.ones(1, 17, 1, device=x.device)


def plan_nothing(head, ctx):
    yield from ()


def test_stock_costs_no_run(vit, monkeypatch):
    """A model of stock's classes, and of classes with handlers of their own, has no strangers and is not run."""

    class Head(nn.Linear):
        pass

    assert strangers(vit, walk(vit)) == {}
    vit.head = Head(48, 3)
    assert list(strangers(vit, walk(vit))) == ["head"]
    with timm_resize.registry.override():
        timm_resize.register(Head)(plan_nothing)
        assert strangers(vit, walk(vit)) == {}
    monkeypatch.setattr(nn.Module, "__call__", lambda *a, **k: pytest.fail("run"))
    vit.head = nn.Linear(48, 3)
    timm_resize.plan_resize(vit, SIZE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.blocks.append(PerToken(17)), "blocks.2, a PerToken, fails (RuntimeError: "),
        (lambda m: setattr(m.blocks[0], "mlp", Around(PerToken(17))), "blocks.0.mlp.inner, a PerToken, fails"),
        (lambda m: setattr(m.blocks[0], "norm1", nn.LayerNorm((17, 48))), "blocks.0.norm1, a LayerNorm, fails"),
        (lambda m: setattr(m.blocks[1].attn, "proj", Sliced(48, 48)), "blocks.1.attn.proj, a Sliced, fails"),
        (
            lambda m: (
                m.reset_classifier(0, ""),
                setattr(m, "head", nn.Sequential(nn.Flatten(), nn.Linear(17 * 48, 3))),
            ),
            "head.1, a Linear, fails",
        ),
    ],
    ids=["added", "wrapped", "norm", "subclass", "head"],
)
@pytest.mark.parametrize("size", [SIZE, (32, 128)], ids=["more tokens", "as many tokens"])
def test_what_counts_tokens_is_named(vit, change, words, size):
    """Also where the new size has as many tokens, at other places; the model stays as it was."""
    change(vit)
    want = first(vit(image((64, 64))))
    with pytest.raises(timm_resize.UnsupportedModelError) as caught:
        timm_resize.resize_(vit, size)
    text = str(caught.value)
    assert f"img_size={size} is not followed by {words}" in text
    assert text.endswith(
        "Put the layer that it stands for in its place for the resize, or write a handler with @timm_resize.register."
    )
    assert torch.equal(first(vit(image((64, 64)))), want)


def test_what_does_not_is_resized(vit):
    """Wrappers, subclasses and instances with a forward of their own that take any number of tokens."""
    bare = copy.deepcopy(vit)
    timm_resize.resize_(bare, SIZE)
    vit.blocks[0] = Around(vit.blocks[0])
    vit.blocks[1].mlp = Around(vit.blocks[1].mlp)
    vit.norm.forward = types.MethodType(nn.LayerNorm.forward, vit.norm)
    vit.__class__ = type("Mine", (type(vit),), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_resize.resize_(vit, SIZE)
    assert torch.equal(vit(image(SIZE)), bare(image(SIZE)))


def test_hooks_of_the_users_do_not_run(vit):
    """A dry run leaves no trace in what hooks write to, nor in caches."""
    seen = []
    vit.blocks[0] = Around(vit.blocks[0])
    vit.blocks[0].register_forward_hook(lambda *args: seen.append(args))
    timm_resize.plan_resize(vit, SIZE)
    assert seen == []
    levit = timm.create_model("levit_128s", depth=(1, 1, 1)).eval()
    levit.head = Around(levit.head)
    levit(image((224, 224)))
    caches = [set(m.attention_bias_cache) for m in levit.modules() if hasattr(m, "attention_bias_cache")]
    timm_resize.plan_resize(levit, 192)
    assert caches == [set(m.attention_bias_cache) for m in levit.modules() if hasattr(m, "attention_bias_cache")]


def test_what_cannot_be_run_is_said(vit):
    """A forward that wants more than an image, or values, is resized with one warning."""
    vit.__class__ = type("Two", (type(vit),), {"forward": lambda self, x, y: self.head(self.forward_features(x) + y)})
    with pytest.warns(UserWarning, match="Two: whether what is not of timm in it follows could not be tried"):
        timm_resize.resize_(vit, SIZE)
    assert vit.pos_embed.shape == (1, 61, 48)


def test_layers_that_are_not_as_they_were_built():
    """What a handler cannot read is an UnsupportedModelError that names the module and what is missing."""
    model = timm.create_model("tiny_vit_5m_224", depths=(1, 1, 1, 1), device="meta")
    model.stages[1].blocks[0].attn = Around(model.stages[1].blocks[0].attn)
    with pytest.raises(timm_resize.UnsupportedModelError, match=r"attn is a Around, which has no handler"):
        timm_resize.plan_resize(model, 192)
    model = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=3, device="meta")
    model.blocks[0] = Around(model.blocks[0])
    with pytest.raises(timm_resize.UnsupportedModelError, match=r"of Beit cannot read blocks\.0, a Around .*attn"):
        timm_resize.plan_resize(model, 192)


@pytest.mark.parametrize(
    ("name", "proj", "words"),
    [
        (
            "vit_tiny_patch16_224",
            nn.Conv2d(3, 192, 16, stride=10),
            r"has stride=\(10, 10\), its patches are \(16, 16\)",
        ),
        ("vit_tiny_patch16_224", nn.Conv2d(3, 192, 18, stride=16), "has a 6x9 map of 112x160, its patches are"),
        ("swinv2_cr_tiny_224", nn.Conv2d(3, 96, 4, stride=2), r"has stride=\(2, 2\), its patches are \(4, 4\)"),
        ("vit_tiny_r_s16_p8_224", nn.Conv2d(512, 192, 2, stride=1), r"has stride=\(1, 1\), its patches are"),
        ("vit_tiny_patch16_224", nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 192, 2, 2)), "has a 14x20 map"),
    ],
)
def test_projections_that_cut_otherwise(name, proj, words):
    """A projection that does not cut the image into its patches makes other tokens than are counted."""
    model = timm.create_model(name, device="meta", **({"depth": 1} if name.startswith("vit") else {}))
    model.patch_embed.proj = proj
    size = (256, 256) if name == "vit_tiny_r_s16_p8_224" else (112, 160)
    with pytest.raises(timm_resize.UnsupportedModelError, match=f"patch_embed.proj {words}"):
        timm_resize.plan_resize(model, size)


def test_projections_that_cut_alike(vit):
    """A wider kernel with the padding for it, or a chain of convolutions, makes the same patches."""
    for proj in (
        nn.Conv2d(3, 48, 20, stride=16, padding=2),
        nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 48, 4, 4)),
    ):
        model = copy.deepcopy(vit)
        model.patch_embed.proj = proj
        timm_resize.resize_(model, SIZE)
        assert model(image(SIZE)).shape == (1, 1000)
    model.patch_embed.proj = Around(proj)
    with pytest.raises(
        timm_resize.UnsupportedModelError, match=r"resizes the kernel of a torch.nn.Conv2d, and .* tests\."
    ):
        timm_resize.plan_resize(model, patch_size=8)


class Transposed(nn.Linear):
    """Keeps its weight as (inputs, outputs)."""

    def forward(self, x):
        return x @ self.weight + self.bias


class Renamed(nn.Linear):
    """Computes what a linear layer does, in its own words."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("cls", [Transposed, Renamed])
def test_a_square_weight_that_is_used_otherwise(cls):
    """Shapes fit a transposed weight, values do not: refused, with nothing changed; another spelling is followed."""
    model = timm.create_model("resmlp_12_224").eval()
    model.blocks = model.blocks[:1]
    plain = model.blocks[0].linear_tokens
    layer = model.blocks[0].linear_tokens = cls(196, 196)
    layer.load_state_dict(plain.state_dict())
    if cls is Transposed:
        with pytest.raises(timm_resize.UnsupportedModelError, match="does not compute what a torch.nn.Linear"):
            timm_resize.resize_(model, 160)
        assert model.blocks[0].linear_tokens.weight.shape == (196, 196)
    else:
        timm_resize.resize_(model, 160)
        assert torch.equal(layer.weight, token_matrix((14, 14), (10, 10))(plain.weight.detach()))


class Plain(nn.Module):
    """A network of torch's layers; `last` gives its logits from a map."""

    def __init__(self, last):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 4, 4), last

    def forward(self, x):
        return self.last(self.conv(x))


class Cut(nn.Module):
    """Adds as many positions as there are tokens, of a table that is long enough for 128 px."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1024, 4))

    def forward(self, x):
        x = x.flatten(2).mT
        return (x + self.table[: x.shape[1]]).mean(1)


def test_a_network_of_any_size_needs_no_handler():
    """A class that nobody wrote a handler for is accepted where it runs at the size and at a large one; kept bits."""
    net = Plain(nn.AdaptiveAvgPool2d(1)).eval()
    before, x = {k: v.clone() for k, v in net.state_dict().items()}, image((96, 160))
    want = net(x)
    plan = timm_resize.resize_(net, (96, 160))
    assert plan.tensors == ()
    assert torch.equal(net(x), want)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert timm_resize.plan_resize(net, 64).old_size == (96, 160)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (Cut(), "last, a Cut, fails"),  # it would run at 32 px, with the positions of a map as wide as 128 px
        (nn.Sequential(nn.Flatten(), nn.Linear(256, 2)), "last.1, a Linear, fails"),  # it runs at 32 px alone
    ],
)
def test_state_of_a_size_without_handler_is_refused(last, said):
    """What cuts a table to length, or flattens a map, is no network of any size."""
    with pytest.raises(timm_resize.UnsupportedModelError, match="no handler") as caught:
        timm_resize.plan_resize(Plain(last), 32)
    assert said in str(caught.value)
    assert "timm_resize.infer" in str(caught.value)


def test_a_network_without_handler_names_sizes_that_pass():
    """One with a smallest size says which is near."""
    net = Plain(nn.Sequential(nn.AvgPool2d(3), nn.AdaptiveAvgPool2d(1)))
    with pytest.raises(timm_resize.InvalidSizeError, match="Use 12"):
        timm_resize.plan_resize(net, 8)
    with pytest.raises(timm_resize.UnsupportedModelError, match="no option but img_size"):
        timm_resize.plan_resize(net, 64, patch_size=8)
