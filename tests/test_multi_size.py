"""One model at several sizes: each against a model of its own, resized to the size."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn

import timm_resize
from tests.helpers.examples import EXAMPLES, sweep
from tests.helpers.examples import example as build
from tests.helpers.oracle import assert_same_structure, first, image, redraw_, stock, tensors
from timm_resize import MultiSize


def sizes_of(model):
    """Four valid sizes beside the model's own, most of them small: a larger, a square and both non-square ways."""
    native = timm_resize.plan_resize(model).new_size[0]
    wanted = [
        (native + 32, native // 2),
        (native // 2, native // 2),
        (native // 2, native),
        (native * 2 // 3, native // 2),
    ]
    return list(dict.fromkeys(size for w in wanted for size in timm_resize.nearest_sizes(model, w)[:1]))


def resized(model, size):
    other = copy.deepcopy(model)
    other.__dict__.pop("_resize_chain", None)  # a size is made from the present weights, not from their originals
    timm_resize.resize_(other, size)
    return other


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", sweep(turn=0, of=4))
def test_equals_models_of_each_size(name):
    """At four sizes and its own the output is that of a separately resized model; only sized tensors are kept."""
    model = build(name)
    multi = MultiSize(model)
    native, sizes = timm_resize.plan_resize(model).new_size, sizes_of(model)
    before = {k: v.clone() for k, v in tensors(model).items()}
    apart = {size: resized(model, size) for size in [native, *sizes]}
    with torch.inference_mode():
        want = {size: first(apart[size](image(size))) for size in apart}
        for size in [native, *sizes, sizes[0], native]:
            torch.testing.assert_close(first(multi(image(size))), want[size], rtol=1e-6, atol=1e-6)
    shared = {t.untyped_storage().data_ptr() for t in tensors(model).values()}
    for size in sizes:
        plan = timm_resize.plan_resize(model, size)
        sized = {c.key for c in plan if c.kind != "attribute"}
        own = {k: v for k, v in tensors(apart[size]).items() if k in sized}
        assert multi._kept[size].nbytes <= sum(t.numel() * t.element_size() for t in own.values())
        extra = {k for k, t in tensors(multi.at(size)).items() if t.untyped_storage().data_ptr() not in shared}
        assert extra <= sized  # all others are the model's own
    after = tensors(model)
    assert after.keys() == before.keys()
    assert all(
        torch.equal(v, before[k]) for k, v in after.items() if "rel_indices" not in k
    )  # ConViT's forward fills it


@pytest.mark.parametrize("name", sweep(turn=1, of=4))
def test_gradients_are_those_of_resampling_then_forward(name):
    """Gradients equal those of a resized copy, pulled back through the maps by autograd on their float64 matrices."""
    model = build(name)
    size = sizes_of(model)[1]
    plan = timm_resize.plan_resize(model, size)
    apart = resized(model, size)
    output = first(MultiSize(model)(image(size)))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weight).sum().backward()
    (first(apart(image(size))) * weight).sum().backward()
    theirs = {k: p.grad for k, p in apart.named_parameters()}
    maps = {c.key: c.how for c in plan if c.kind == "parameter"}
    for key, param in model.named_parameters():
        want = theirs[key]
        if key in maps and want is not None:  # ⟨g, A x⟩ = ⟨Aᵀ g, x⟩: the pullback of g, by its action on random x
            x = torch.randn(param.shape, generator=torch.Generator().manual_seed(4)).double()
            direct, pulled = (want.double() * maps[key](x)).sum(), (param.grad.double() * x).sum()
            torch.testing.assert_close(pulled, direct, rtol=1e-3, atol=1e-3 * want.norm().item() + 1e-5)
        elif want is None:
            assert param.grad is None
        else:
            torch.testing.assert_close(param.grad, want, rtol=1e-3, atol=1e-4 * want.abs().max().item() + 1e-6)


def test_multi_crop_training_moves_one_table():
    """Crops of two sizes train the one Parameter, by the sum of what each alone would give it."""
    model = build("vit_tiny_patch16_224")
    multi, grads = MultiSize(model), []
    for sizes in ([224], [96], [224, 96]):
        model.zero_grad()
        sum(multi(image((s, s))).square().sum() for s in sizes).backward()
        grads.append(model.pos_embed.grad.clone())
    torch.testing.assert_close(grads[2], grads[0] + grads[1])
    optimizer, before = torch.optim.SGD(multi.parameters(), lr=0.1), model.pos_embed.detach().clone()
    optimizer.step()
    assert not torch.equal(model.pos_embed, before)
    with torch.no_grad():
        torch.testing.assert_close(multi(image((96, 96))), resized(model, 96)(image((96, 96))))


def test_a_changed_weight_is_seen():
    """A step of an optimizer, loaded weights and a new head: the next forward uses them at every size."""
    model = build("swin_tiny_patch4_window7_224")
    multi, x = MultiSize(model), image((192, 256))

    def check():
        with torch.no_grad():
            torch.testing.assert_close(multi(x), resized(model, (192, 256))(x), rtol=1e-6, atol=1e-6)

    check()
    with torch.no_grad():
        model.layers[0].blocks[0].attn.relative_position_bias_table.mul_(2)
    check()
    multi.load_state_dict(redraw_(copy.deepcopy(model), seed=5).state_dict())
    check()
    model.reset_classifier(7)
    check()
    assert multi(x).shape == (1, 7)
    timm_resize.resize_(model, 256)
    check()
    multi.half().float()
    check()
    multi.double()
    assert multi(x.double()).dtype == torch.float64


def test_modes_statistics_and_hooks_reach_every_size():
    """train(), running statistics and hooks registered later act on all sizes; tensors are kept."""
    model = stock("levit_128s", **EXAMPLES["levit_128s"])
    multi, x = MultiSize(model), image((96, 160), batch=2)
    with torch.no_grad():
        multi(x)
        kept = multi._kept[(96, 160)].tensors
        multi.train()
        assert multi.at((96, 160)).training
        before = {k: v.clone() for k, v in model.named_buffers() if "running_mean" in k}
        multi(x)
        assert all(not torch.equal(v, before[k]) for k, v in model.named_buffers() if k in before)
        multi.eval()
        assert not any(m.training for m in multi.at((96, 160)).modules())
        torch.testing.assert_close(multi(x), resized(model, (96, 160))(x), rtol=1e-6, atol=1e-6)
        assert multi._kept[(96, 160)].tensors is kept
        seen = []
        model.stages[1].blocks[0].attn.register_forward_hook(lambda m, i, o: seen.append(m.resolution))
        multi(x)
        multi(image((224, 224)))
    assert seen == [(3, 5), (7, 7)]


def test_state_dict_is_the_plain_models():
    """Keys and parameters are the plain model's, alone and inside another module."""
    model = build("vit_tiny_patch16_224")
    multi, outer = MultiSize(model), nn.Sequential(MultiSize(model), nn.Identity())
    assert multi.state_dict().keys() == model.state_dict().keys()
    assert [id(p) for p in multi.parameters()] == [id(p) for p in model.parameters()]
    assert list(outer.state_dict()) == [f"0.{k}" for k in model.state_dict()]
    other = redraw_(copy.deepcopy(model), seed=9)
    outer.load_state_dict({f"0.{k}": v for k, v in other.state_dict().items()})
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_copies_and_pickles():
    """Copies work on their own weights, before and after use."""
    multi, x = MultiSize(build("beit_base_patch16_224")), image((160, 96))
    with torch.no_grad():
        want = multi(x)
        for other in (copy.deepcopy(multi), pickle.loads(pickle.dumps(multi))):
            torch.testing.assert_close(other(x), want)
            next(other.parameters()).add_(1)
            assert not torch.equal(other(x), want)
            torch.testing.assert_close(multi(x), want)
            other.load_state_dict(multi.state_dict())
            torch.testing.assert_close(other(x), want)


def test_the_cache_is_bounded():
    """The least recently used size goes when the limit is passed; the one in use stays."""
    multi = MultiSize(build("vit_tiny_patch16_224"), max_bytes=150 * 192 * 4)  # tokens: 37, 50 and 101
    with torch.no_grad():
        for size in (96, 112, 96, 160):
            multi(image((size, size)))
    assert multi.sizes == [(96, 96), (160, 160)]
    assert multi.nbytes <= multi.max_bytes
    multi.clear()
    assert (multi.sizes, multi.nbytes) == ([], 0)


def test_each_is_a_model_of_its_size():
    """`at` gives what a resize would have made: structure, input size, features."""
    model = build("swin_tiny_patch4_window7_224")
    made, apart = MultiSize(model).at((192, 256)), resized(model, (192, 256))
    for module in made.modules():  # tables are plain tensors there
        for name in [n for n, v in module.__dict__.items() if isinstance(v, torch.Tensor)]:
            module._parameters[name] = nn.Parameter(module.__dict__.pop(name))
    assert_same_structure(made, apart)
    assert timm_resize.data_config(made)["input_size"] == (3, 192, 256)


def test_errors():
    """A size that cannot work, an option that the model does not have, a limit that is none."""
    multi = MultiSize(build("vit_tiny_patch16_224"))
    with pytest.raises(timm_resize.InvalidSizeError, match="Use 16"):
        multi(image((8, 8)))
    with pytest.raises(timm_resize.ResizeError, match="window_policy='bad' is not known"):
        MultiSize(stock("resnet18"), window_policy="bad")
    with pytest.raises(timm_resize.ResizeError, match="max_bytes=-1 is not a number of bytes"):
        MultiSize(stock("resnet18"), max_bytes=-1)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "levit_128s", "resnet18"])
def test_at_size_restores_everything(name):
    """Inside the block the model is at the size; afterwards, also after an error, it is bit for bit as before."""
    model = build(name)
    before, other = {k: v.clone() for k, v in tensors(model).items()}, copy.deepcopy(model)
    with pytest.raises(KeyError), timm_resize.at_size(model, (160, 96)):  # noqa: PT012
        assert_same_structure(model, resized(other, (160, 96)))
        with timm_resize.at_size(model, 128):
            assert first(model(image((128, 128)))).isfinite().all()
        raise KeyError
    assert all(torch.equal(v, before[k]) for k, v in tensors(model).items())
    assert_same_structure(model, other)


def test_at_size_keeps_what_was_learnt():
    """A table trained inside the block is resized back, not thrown away."""
    model = build("vit_tiny_patch16_224")
    before = model.pos_embed.detach().clone()
    with timm_resize.at_size(model, 96), torch.no_grad():
        model.pos_embed.add_(1.0)
    assert model.patch_embed.img_size == (224, 224)
    assert model.pos_embed.shape == before.shape
    assert (model.pos_embed - before).mean() > 0.5


class Scored(torch.nn.Module):
    """Holds a model two levels down, and does something of its own with what it gives."""

    def __init__(self, model):
        super().__init__()
        self.inner = torch.nn.ModuleDict({"net": model})
        self.score = torch.nn.Linear(10, 2)

    def forward(self, x, scale=1.0):
        return self.score(self.inner["net"](x)) * scale


@pytest.mark.parametrize("train", [False, True])
def test_what_holds_a_model_is_run_whole(train):
    """A wrapper's own layers and arguments take part, at every size; gradients reach both."""
    model = redraw_(stock("mixer_s32_224", **EXAMPLES["mixer_s32_224"], num_classes=10)).train(train)
    net = Scored(model)
    multi = timm_resize.MultiSize(net)
    assert multi.state_dict().keys() == net.state_dict().keys()
    for size in ((224, 224), (192, 96)):
        x = torch.randn(2, 3, *size)
        resized = copy.deepcopy(model)
        timm_resize.resize_(resized, size)
        want = net.score(resized(x)) * 3
        got = multi(x, scale=3)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        net.zero_grad()
        got.sum().backward()
        assert net.score.weight.grad.abs().sum() > 0
        assert all(p.grad is not None for p in model.parameters())


def test_a_compiled_model_inside_is_run_at_each_size():
    """What `torch.compile` made runs the model that it compiled; a size's own stands in its place."""
    model = redraw_(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)).eval()
    net, resized = Scored(torch.compile(model, backend="eager")), copy.deepcopy(model)
    timm_resize.resize_(resized, 96)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(timm_resize.MultiSize(net)(x), net.score(resized(x)))


def test_the_models_public_attributes_pass_through():
    """What training loops ask a model for: configuration, classes, groups, features; what neither has is an error."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    multi = timm_resize.MultiSize(model)
    assert multi.pretrained_cfg is model.pretrained_cfg
    assert (multi.num_classes, multi.no_weight_decay()) == (3, model.no_weight_decay())
    assert multi.group_matcher() == model.group_matcher()
    assert timm.data.resolve_model_data_config(multi) == timm.data.resolve_model_data_config(model)
    for duplicate in (copy.deepcopy(multi), pickle.loads(pickle.dumps(multi))):
        assert duplicate.num_classes == 3
    with pytest.raises(AttributeError, match="nonsense"):
        multi.nonsense  # noqa: B018


NARROW = {"embed_dim": (32, 48, 64), "num_heads": (2, 3, 4), "depth": (1, 1, 1), "num_classes": 3}
"""A LeViT of one block a stage, in which all sizes and caches are as in the whole one."""


def test_biases_kept_in_eval_follow_their_table():
    """LeViT keeps its biases in eval: a second backward works, and a change of a table is seen."""
    model = redraw_(timm.create_model("levit_128s", **NARROW)).eval()
    multi = timm_resize.MultiSize(model)
    for size in ((224, 224), (96, 160)):
        x = torch.randn(2, 3, *size)
        for _ in range(2):
            multi(x).sum().backward()
        with torch.no_grad():
            multi(x)
            for name, p in model.named_parameters():
                if name.endswith("attention_biases"):
                    p.add_(0.5 * torch.randn_like(p))
            fresh = timm.create_model("levit_128s", **NARROW).eval()
            fresh.load_state_dict(model.state_dict())
            timm_resize.resize_(fresh, size)
            torch.testing.assert_close(multi(x), fresh(x), rtol=1e-5, atol=1e-5)


def keeps_biases():
    """A LeViT in eval whose outputs depend on its biases."""
    return redraw_(timm.create_model("levit_128s", **NARROW)).eval()


@torch.no_grad()
def change_biases_(model, by=lambda p: p.add_(0.5 * torch.randn_like(p))):
    """Write to every bias table."""
    for name, p in model.named_parameters():
        if name.endswith("attention_biases"):
            by(p)


@torch.no_grad()
def from_scratch(model, size, x):
    """What stock's model with these weights, which has cached nothing, gives once resized."""
    fresh = timm.create_model("levit_128s", **NARROW).eval()
    timm_resize.resize_(fresh, timm_resize.plan_resize(model).new_size)
    fresh.load_state_dict(model.state_dict())
    timm_resize.resize_(fresh, size)
    return fresh(x)


def test_biases_that_sizes_share_follow_their_table():
    """At 208 pixels two of LeViT's stages keep their grids, and with them the model's own attention."""
    model, x = keeps_biases(), torch.randn(2, 3, 208, 208)
    multi = timm_resize.MultiSize(model)
    for _ in range(2):
        multi(x).sum().backward()
    with torch.no_grad():
        multi(x)
        change_biases_(model)
        torch.testing.assert_close(multi(x), from_scratch(model, (208, 208), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_writes_that_torch_does_not_count(size):
    """On the CPU a weight is compared by value: in place through `.data`, assigned twice, or of inference mode."""
    writes = {
        "in place": lambda p: p.data.mul_(2),
        "assigned": lambda p: [setattr(p, "data", p.data * 2) for _ in range(2)],
        "counted": lambda p: p.mul_(2),
    }
    x = torch.randn(1, 3, *size)
    with torch.inference_mode():
        inferred = copy.deepcopy(keeps_biases())
    for model in (keeps_biases(), inferred):
        multi = timm_resize.MultiSize(model)
        for write in writes.values():
            with torch.inference_mode():
                multi(x)
                change_biases_(model, write)
                torch.testing.assert_close(multi(x), from_scratch(model, size, x), rtol=1e-5, atol=1e-5)


def test_a_compiled_multi_size_has_one_whole_graph_a_size():
    """Views are made outside of graphs: no break, one graph for each size, and a changed weight needs no other."""
    torch._dynamo.reset()
    model, graphs = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3).eval(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    multi = timm_resize.MultiSize(redraw_(model))
    compiled = torch.compile(multi, backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        for size in ((224, 224), (96, 160)):
            with torch.no_grad():
                torch.testing.assert_close(compiled(image(size)), resized(model, size)(image(size)))
                model.pos_embed.mul_(2)
                torch.testing.assert_close(compiled(image(size)), resized(model, size)(image(size)))
    assert len(graphs) == 2
    torch._dynamo.reset()
