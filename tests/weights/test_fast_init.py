"""Loading without initialising: the same tensors as stock, bit for bit, whatever the class does in its constructor."""

from __future__ import annotations

import copy
import functools
import threading
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import _factory, build_model_with_cfg, register_model
from timm.models._registry import _model_entrypoints, _model_to_module, _module_to_models
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_resize
from tests.helpers.examples import ALWAYS, EXAMPLES
from tests.helpers.oracle import assert_same_structure, image, redraw_, stock, tensors
from timm_resize.weights import fast_init

OTHERS = (
    "cpubone_nano",
    "csatv2",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientvim_m1",
    "efficientvit_b0",
    "fasternet_t0",
    "fastvit_t8",
    "ghostnet_050",
    "iformer_t",
    "inception_next_atto",
    "lcnetv2_small",
    "mobilenetv3_small_050",
    "pvt_v2_b0",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "rexnet_100",
    "shvit_s1",
    "starnet_s050",
    "swiftformer_xs",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
    "ese_vovnet19b_slim_dw",
    "xcit_nano_12_p8_224",
)
"""Small models of classes that no example has."""


@pytest.fixture(autouse=True)
def _all_deferred(monkeypatch):
    """Defer tensors of any size, as the models here are small."""
    monkeypatch.setattr(fast_init, "LEAST", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save(model, path):
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    return str(path)


def overlay(path, **config):
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), **config}}


def same_bits(got, want):
    a, b = tensors(got), tensors(want)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
        assert (a[name].dtype, a[name].stride()) == (b[name].dtype, b[name].stride()), name


def slow_unless(name, always):
    return pytest.param(name, marks=() if name in always else pytest.mark.slow)


@pytest.mark.parametrize(
    "name", [slow_unless(n, {*sorted(ALWAYS)[::4], *OTHERS[::6]}) for n in sorted({*EXAMPLES, *OTHERS})]
)
def test_what_is_read_is_what_stock_reads(name, tmp_path):
    """Every family, and classes that have no family of their own: stock's tensors, buffers and attributes."""
    args = {"num_classes": 3, **EXAMPLES.get(name, {})}
    path = save(redraw_(stock(name, **args)), tmp_path / "weights.safetensors")
    theirs = stock(name, **args, **overlay(path, num_classes=3))
    ours = timm_resize.create_model(name, **args, **overlay(path, num_classes=3)).eval()
    same_bits(ours, theirs)
    assert_same_structure(ours, theirs)


@pytest.mark.parametrize("name", sorted(ALWAYS)[1::4])
def test_a_checkpoint_path_is_read_as_stock_reads_it(name, tmp_path):
    """A model of every fourth family by `checkpoint_path`, with the plugin in: stock's tensors and buffers."""
    args = {"num_classes": 3, **EXAMPLES[name]}
    model = redraw_(stock(name, **args))
    path = save(model, tmp_path / "weights.safetensors")
    with timm_resize.install():
        ours = timm.create_model(name, **args, checkpoint_path=path).eval()
    same_bits(ours, model)


def test_nothing_random_is_drawn_for_what_is_read(tmp_path):
    """When the file holds everything, torch's random stream stands where it stood; stock's moves on."""
    path = save(redraw_(stock("test_resnet", num_classes=5)), tmp_path / "weights.safetensors")
    for create, moved in ((stock, True), (timm_resize.create_model, False)):
        for how in (overlay(path, num_classes=5), {"checkpoint_path": path}):
            torch.manual_seed(1)
            before = torch.get_rng_state()
            create("test_resnet", num_classes=5, **how)
            assert torch.equal(before, torch.get_rng_state()) != moved


def test_a_new_head_is_drawn_by_its_own_initialiser(tmp_path):
    """Another number of classes: all but the head is read, the head is what `nn.Linear` draws from the seed."""
    path = save(redraw_(stock("test_resnet")), tmp_path / "weights.safetensors")
    theirs = stock("test_resnet", num_classes=5, **overlay(path))
    torch.manual_seed(7)
    ours = timm_resize.create_model("test_resnet", num_classes=5, **overlay(path)).eval()
    torch.manual_seed(7)
    head = nn.Linear(96, 5)
    assert torch.equal(ours.fc.weight, head.weight)
    assert torch.equal(ours.fc.bias, head.bias)
    ours.fc, theirs.fc = nn.Identity(), nn.Identity()
    same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("name", "expected"), [("vit_tiny_patch16_224", 0.02), ("convnext_atto", 0.02 * 0.5), ("levit_128s", 0.02)]
)
def test_a_new_head_has_the_spread_of_its_models_initialiser(name, expected, tmp_path):
    """Heads drawn by the model's own rule (ConvNeXt also scales it by `head_init_scale`) get that rule's std."""
    args = {
        "convnext_atto": {"depths": (1, 1, 1, 1), "head_init_scale": 0.5},
        "vit_tiny_patch16_224": {"depth": 1},
        "levit_128s": {"depth": (1, 1, 1)},
    }[name]
    path = save(stock(name, **args), tmp_path / "weights.safetensors")
    ours = timm_resize.create_model(name, num_classes=50, **args, **overlay(path))
    head = ours.get_classifier()
    weight = (head[0] if isinstance(head, tuple) else head).weight if name != "levit_128s" else ours.head.linear.weight
    assert weight.shape[0] == 50
    assert weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_other_channels_and_types_are_adapted_as_stock_does(name, tmp_path):
    """`in_chans=1`, a half-precision file, a bfloat16 model, `features_only`: stock's bits."""
    model = redraw_(stock(name))
    path = save(model, tmp_path / "weights.safetensors")
    half = save(model.half(), tmp_path / "half.safetensors")
    for args in (
        {"in_chans": 1, **overlay(path)},
        overlay(half),
        {"features_only": True, **overlay(path)},
        *([{"dtype": torch.bfloat16, **overlay(path)}] if name.startswith("vit") else []),
    ):
        same_bits(timm_resize.create_model(name, **args), stock(name, **args))


def test_labels_with_a_background_class_are_cut_as_stock_cuts_them(tmp_path):
    """`label_offset=1` reads the classifier from its second row on."""
    path = save(redraw_(stock("test_resnet", num_classes=11)), tmp_path / "weights.safetensors")
    args = {"num_classes": 10, **overlay(path, num_classes=10, label_offset=1)}
    same_bits(timm_resize.create_model("test_resnet", **args), stock("test_resnet", **args))
    assert torch.equal(timm_resize.create_model("test_resnet", **args).fc.weight, load_file(path)["fc.weight"][1:])


def test_pickled_checkpoints_are_read_too(tmp_path):
    """A `.pth` file with a wrapped `state_dict_ema` gives the tensors it holds."""
    model = redraw_(stock("test_resnet", num_classes=5))
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {}, "state_dict_ema": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    for how in (overlay(path, num_classes=5), {"checkpoint_path": str(path)}):
        same_bits(timm_resize.create_model("test_resnet", num_classes=5, **how), model)


def test_the_switch_keeps_stocks_random_stream(tmp_path):
    """With `fast_init=False`, in `install` or in our `create_model`, a seed gives stock's head and next number."""
    path = save(redraw_(stock("test_resnet")), tmp_path / "weights.safetensors")
    args = {"num_classes": 5, **overlay(path)}

    def drawn(create):
        torch.manual_seed(3)
        return create("test_resnet", **args).fc.weight, torch.rand(4)

    want = drawn(stock)
    with timm_resize.install(fast_init=False):
        off = [drawn(timm.create_model), drawn(timm_resize.create_model)]
        with timm_resize.install():
            on = drawn(timm.create_model)
            off.append(drawn(functools.partial(timm_resize.create_model, fast_init=False)))
        off.append(drawn(timm.create_model))
    for got in off:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(on[1], want[1])


def test_training_does_not_touch_the_file_nor_the_file_the_model(tmp_path):
    """An in-place update leaves every byte of the file; overwriting and deleting the file leaves the model."""
    path = tmp_path / "weights.safetensors"
    save(redraw_(stock("test_resnet", num_classes=2)), path)
    content = path.read_bytes()
    model = timm_resize.create_model("test_resnet", num_classes=2, **overlay(path, num_classes=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(image((64, 64), batch=2)).sum().backward()
    optimizer.step()
    assert path.read_bytes() == content
    held = {k: v.clone() for k, v in model.state_dict().items()}
    assert any(not torch.equal(v, load_file(path)[k]) for k, v in held.items())
    path.write_bytes(b"\0" * len(content))
    path.unlink()
    assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())


def test_each_parameter_has_memory_of_its_own(tmp_path):
    """No tensor of a loaded model shares a storage with another, as after stock's load; so parts can be saved alone."""
    path = save(stock("test_resnet"), tmp_path / "weights.safetensors")
    model = timm_resize.create_model("test_resnet", **overlay(path))
    held = [t for t in tensors(model).values() if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in held)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


class Odd(nn.Module):
    """A model whose constructor reads what it has just filled, in many ways, and keeps what it read."""

    def __init__(self, num_classes=4, in_chans=3, **_):
        super().__init__()
        self.num_classes = num_classes
        self.found = [
            nn.init.constant_(torch.empty(40, 30), 2.0).sum().item(),
            torch.empty(40).fill_(3.0).mul_(2.0).tolist(),
            torch.ones(50).numpy().sum().item(),
            torch.ones(50).untyped_storage().tolist()[3],
        ]
        self.weight = nn.Parameter(torch.empty(40, 30))
        nn.init.constant_(self.weight, 5.0)
        self.twice = nn.Parameter(self.weight.detach() * 2)
        with torch.no_grad():
            self.weight[3:5].fill_(7.0)
            self.weight.view(-1)[0] = 8.0
        self.view = self.weight.detach()[4]
        self.same = self.weight
        self.layer = nn.Linear(20, 20)
        self.layer.weight.data.zero_()
        self.copied = copy.deepcopy(self.layer)
        self.register_buffer("ramp", torch.zeros(100).add_(1.0).cumsum(0), persistent=False)
        self.register_buffer("filled", torch.zeros(100).fill_(0.25), persistent=False)
        own = torch.Generator().manual_seed(5)
        self.register_buffer("projection", torch.empty(64).normal_(generator=own), persistent=False)
        own.manual_seed(6)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.register_buffer("features", torch.empty(64).uniform_(), persistent=False)
        self.fc = nn.Linear(8, num_classes)


def odd_model(pretrained=False, **kwargs):
    return build_model_with_cfg(Odd, "odd_model", pretrained, **kwargs)


@pytest.fixture(autouse=True)
def _registered():
    register_model(odd_model)
    yield
    _model_entrypoints.pop("odd_model")
    _module_to_models[_model_to_module.pop("odd_model")].discard("odd_model")


def test_a_constructor_may_read_what_it_filled(tmp_path):
    """Values read in the constructor, views, ties, copies and fixed random features are stock's."""
    path = save(redraw_(stock("odd_model")), tmp_path / "weights.safetensors")
    theirs = stock("odd_model", **overlay(path))
    for how in (overlay(path), {"checkpoint_path": path}):
        ours = timm_resize.create_model("odd_model", **how).eval()
        same_bits(ours, theirs)
        assert ours.found == theirs.found == [2400.0, [6.0] * 40, 50.0, 63]
        assert ours.same is ours.weight
        assert torch.equal(ours.view, ours.weight[4])  # shares its memory
        assert ours.ramp[-1] == 100
        assert torch.equal(ours.features, torch.rand(64, generator=torch.Generator().manual_seed(11)))


def test_a_file_that_lacks_tensors_leaves_them_as_constructed(tmp_path):
    """Without strict loading, what is not in the file has its constructor's values, in-place edits included."""
    path = tmp_path / "weights.safetensors"
    save_file({"layer.bias": torch.ones(20)}, path)
    model = timm_resize.create_model("odd_model", num_classes=3, **overlay(path, classifier="fc", num_classes=4))
    assert torch.equal(model.layer.bias, torch.ones(20))
    assert (model.weight[0, 0], model.weight[3, 1], model.weight[9, 9]) == (8.0, 7.0, 5.0)
    assert torch.equal(model.twice, torch.full((40, 30), 10.0))
    assert not model.copied.weight.any()


def test_a_damaged_or_missing_file_raises_as_stock(tmp_path):
    """A truncated file and no file raise stock's exceptions, and the next call is not affected."""
    path = tmp_path / "weights.safetensors"
    save(stock("test_resnet"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    for bad in (path, tmp_path / "none.safetensors"):
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            stock("test_resnet", **overlay(bad))
        with pytest.raises(theirs.type) as ours:
            timm_resize.create_model("test_resnet", **overlay(bad))
        assert str(ours.value) == str(theirs.value)
    path.write_bytes(whole)
    same_bits(timm_resize.create_model("test_resnet", **overlay(path)), stock("test_resnet", **overlay(path)))


def test_another_load_checkpoint_gets_a_complete_model(tmp_path, monkeypatch):
    """When someone replaced `load_checkpoint` after `install`, the model it gets has all its values."""
    seen = []
    with timm_resize.install():
        monkeypatch.setattr(_factory, "load_checkpoint", lambda model, path: seen.append(model.weight.sum().item()))
        timm.create_model("odd_model", checkpoint_path="x")
        monkeypatch.undo()
        monkeypatch.setattr(fast_init, "LEAST", 1)
    assert seen == [5.0 * (1200 - 61) + 7.0 * 60 + 8.0]


def test_other_dispatch_modes_are_left_alone(tmp_path):
    """Inside someone else's dispatch mode a model is initialised as stock does it, from the same random numbers."""

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    path = save(stock("test_resnet"), tmp_path / "weights.safetensors")
    heads = []
    for create in (stock, timm_resize.create_model):
        torch.manual_seed(3)
        with Passing():
            heads.append(create("test_resnet", num_classes=5, **overlay(path)).fc.weight)
    assert torch.equal(*heads)


def test_threads_load_at_the_same_time(tmp_path):
    """Two threads that load and one that does not each get their own tensors; safetensors is as before."""
    import safetensors.torch as library

    before = library.load_file
    paths = [save(redraw_(stock("test_resnet"), seed=s), tmp_path / f"{s}.safetensors") for s in (1, 2)]
    results = {}

    def work(index):
        for _ in range(3):
            results[index] = timm_resize.create_model("test_resnet", **overlay(paths[index]))

    def plain():
        for _ in range(10):
            results["plain"] = nn.Linear(30, 30), library.load_file(paths[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)] + [threading.Thread(target=plain)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        same_bits(results[index], stock("test_resnet", **overlay(paths[index])))
    assert results["plain"][0].weight.std() > 0.05
    assert library.load_file is before


def test_a_model_built_inside_a_constructor_is_complete(tmp_path):
    """`create_model` called while another model is built and loaded shares its deferral, and both end complete."""

    class Outer(Odd):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = timm.create_model("odd_model")

    with timm_resize.install():
        register_model(outer_model := _entry(Outer))
        try:
            path = save(redraw_(timm.create_model("outer_model")), tmp_path / "weights.safetensors")
            held = load_file(path)
            model = timm.create_model("outer_model", **overlay(path))
        finally:
            _model_entrypoints.pop(outer_model.__name__)
            _module_to_models[_model_to_module.pop(outer_model.__name__)].discard(outer_model.__name__)
    assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.inner.filled, torch.full((100,), 0.25))


def _entry(cls):
    def outer_model(pretrained=False, **kwargs):
        return build_model_with_cfg(cls, "outer_model", pretrained, **kwargs)

    outer_model.__module__ = __name__
    return outer_model


def test_memory_that_nobody_uses_any_more_is_not_filled():
    """Tensors dropped in the constructor draw nothing at the end."""
    before = torch.get_rng_state()
    with fast_init.skipped():
        kept = torch.empty(1000).fill_(2.0)
        torch.empty(1000).normal_()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(kept, torch.full((1000,), 2.0))
