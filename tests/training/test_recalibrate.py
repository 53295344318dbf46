"""Batch-norm statistics estimated anew: against torch's own mean and variance of all that a norm sees."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import timm_resize
from tests.helpers.forks import in_forks
from tests.helpers.oracle import redraw_


class Net(nn.Module):
    """Two norms, the second over what dropout would disturb."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(2, momentum=None)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.second(self.b(self.drop(self.first(self.a(x))))).mean((2, 3))


def batches(*counts, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, size, size, generator=generator) * 2 + 1 for n in counts]


def statistics(net, data):
    """Return the mean and variance of all values at each norm, each batch normalised by its own, as torch does it."""
    with torch.no_grad():
        maps = [net.a(x) for x in data]
        middle = [
            nn.functional.batch_norm(m, None, None, net.first.weight, net.first.bias, training=True) for m in maps
        ]
        seen = [torch.cat([m.mT.flatten(2) for m in ms]) for ms in (maps, [net.b(m) for m in middle])]
    return [(v.double().mean((0, 2)), v.double().var((0, 2))) for v in seen]


def test_they_are_the_mean_and_variance_of_all_that_a_norm_sees():
    """Batches of several lengths count by their values; nothing but the two buffers changes."""
    net = redraw_(Net()).train()
    net.second.eval()
    before, data = copy.deepcopy(net), batches(5, 2, 4)
    assert timm_resize.recalibrate_(net, [(x, "labels") for x in data]) == 11
    for norm, (mean, var) in zip((net.first, net.second), statistics(before, data), strict=True):
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-5)
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before.state_dict()[k])}
    assert changed == {f"{norm}.running_{what}" for norm in ("first", "second") for what in ("mean", "var")}
    assert [(m.training, getattr(m, "momentum", 0)) for m in net.modules()] == [
        (m.training, getattr(m, "momentum", 0)) for m in before.modules()
    ]
    assert not any(m._forward_hooks for m in net.modules())


def test_steps_and_dicts():
    """So many batches are taken, and a dict's images found."""
    net, same = redraw_(Net()), Net()
    same.load_state_dict(net.state_dict())
    data = batches(3, 3, 3)
    assert timm_resize.recalibrate_(net, ({"label": torch.ones(3), "pixel_values": x} for x in data), steps=2) == 6
    timm_resize.recalibrate_(same, data[:2])
    assert torch.equal(net.second.running_var, same.second.running_var)


@pytest.mark.parametrize(
    ("model", "loader", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), batches(2), "no batch norm"),
        (nn.BatchNorm2d(3, track_running_stats=False), batches(2), "no batch norm"),
        (Net(), [], "gave no batch"),
        (Net(), [torch.zeros(2, 3, 12, 12, dtype=torch.uint8)], "gave a torch.uint8 tensor"),
        (Net(), [("a", torch.zeros(3))], "gave a tuple without one"),
        (Net(), batches(1, size=5), "Use larger batches"),
    ],
)
def test_what_cannot_be_done_is_said(model, loader, said):
    """A clear error, and nothing of the model is changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(timm_resize.ResizeError, match=said):
        timm_resize.recalibrate_(model, loader)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_steps_must_take_a_batch():
    with pytest.raises(timm_resize.ResizeError, match="steps=0 takes no batch"):
        timm_resize.recalibrate_(Net(), batches(2), steps=0)


def test_an_error_in_the_middle_leaves_all_as_it_was():
    """A loader that breaks after a batch: modes, momentum and every buffer are as before."""
    net = redraw_(Net()).train()
    before = copy.deepcopy(net.state_dict())

    def broken():
        yield batches(3)[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        timm_resize.recalibrate_(net, broken())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert (net.training, net.first.momentum, net.second.momentum) == (True, 0.1, None)


@torch.no_grad()
def test_each_size_of_a_multi_size_has_its_own():
    """A size's model computes what a model resized to it and recalibrated there computes; the others as before."""
    model = redraw_(timm.create_model("levit_128s", num_classes=3)).eval()
    multi, images = timm_resize.MultiSize(model), {side: batches(4, size=side)[0] for side in (96, 128, 224)}
    before = {side: multi(x) for side, x in images.items()}
    timm_resize.recalibrate_(multi, [images[96], images[224]])
    for side in (96, 224):
        one = copy.deepcopy(model)
        timm_resize.resize_(one, side)
        timm_resize.recalibrate_(one, [images[side]])
        torch.testing.assert_close(multi(images[side]), one.eval()(images[side]), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(multi(images[side]), before[side], rtol=1e-2, atol=1e-2)
    assert torch.equal(multi(images[128]), before[128])
    assert torch.equal(model(images[224]), before[224])
    again = copy.deepcopy(multi)
    assert torch.equal(again(images[96]), multi(images[96]))


def test_half_precision():
    """A model in bfloat16 takes the loader's float32, and keeps its dtype."""
    net = redraw_(Net()).to(torch.bfloat16)
    timm_resize.recalibrate_(net, batches(4))
    assert net.first.running_mean.dtype == torch.bfloat16
    want = net.a(batches(4)[0].to(torch.bfloat16)).float().mean((0, 2, 3))
    torch.testing.assert_close(net.first.running_mean.float(), want, rtol=0.02, atol=0.02)


def test_all_ranks_count(tmp_path):
    """Two processes with batches of their own, one of them with none of the second: the statistics of all."""
    data, net = batches(4, 2, 3), redraw_(Net())
    want = statistics(net, data)

    def of_rank(rank):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=rank, world_size=2)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
        count = timm_resize.recalibrate_(wrapped, data[:2] if rank == 0 else data[2:])
        return count, wrapped.module.second.running_var.tolist()

    for count, var in in_forks(lambda: of_rank(0), lambda: of_rank(1)):
        assert count == 9
        torch.testing.assert_close(torch.tensor(var).double(), want[1][1], rtol=1e-5, atol=1e-5)
