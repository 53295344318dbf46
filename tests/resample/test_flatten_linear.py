"""Linear layers after a flatten: against the old layer on an enlarged map, and behind an adaptive average pool."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import timm_resize
from tests.helpers.oracle import image
from timm_resize.resample import flatten_linear


class Net(nn.Module):
    """A convolution, and a linear layer over its flattened map."""

    def __init__(self, channels_last=False, pool=False):
        super().__init__()
        self.channels_last, self.pool, self.grid_size = channels_last, pool, (6, 6)
        self.conv, self.fc = nn.Conv2d(3, 4, 8, 8), nn.Linear(4 * 36, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.fc((x.permute(0, 2, 3, 1) if self.channels_last else x).flatten(1))


class Wrapper(nn.Module):
    """A timm model beside a layer of the user's own that reads its flattened map."""

    def __init__(self, name):
        super().__init__()
        self.encoder = timm.create_model(name, num_classes=0, global_pool="")
        self.fc = nn.Linear(512 * 4, 3)


@pytest.fixture(autouse=True)
def _registered():
    with timm_resize.registry.override():

        @timm_resize.register(Net, state="fc (out, 4*h*w)")
        def plan_net(net, ctx):
            new = (ctx.new_size[0] // 8, ctx.new_size[1] // 8)
            if min(new) < 1:
                ctx.invalid("is smaller than a cell of 8 pixels")
            yield from ctx.flatten_linear(net.fc, net.grid_size, new, channels_last=net.channels_last, pool=net.pool)
            yield from ctx.attribute(net, grid_size=new)

        @timm_resize.register(Wrapper, state="fc (out, 512*h*w)")
        def plan_wrapper(net, ctx):
            yield from ctx.visit(net.encoder)
            yield from ctx.flatten_linear(net.fc, (2, 2), (ctx.new_size[0] // 32, ctx.new_size[1] // 32))

        yield


@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_enlarged_maps_are_read_alike(channels_last):
    """On the old map enlarged by torch the new layer gives the old layer's outputs."""
    net = Net(channels_last)
    x = torch.randn(2, 4, 6, 6)
    large = F.interpolate(x, (9, 14), mode="bicubic", antialias=True)
    flat = [(m.permute(0, 2, 3, 1) if channels_last else m).flatten(1) for m in (x, large)]
    want = net.fc(flat[0])
    timm_resize.resize_(net, (72, 112))
    assert net.fc.in_features == 4 * 9 * 14
    torch.testing.assert_close(net.fc(flat[1]), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(80, 48), (32, 24), (104, 40)])
@pytest.mark.parametrize("pool", [False, True])
@torch.no_grad()
def test_a_constant_map_gives_the_same_outputs(size, pool):
    """Sums over the map are normalised by its area: a constant map gives the same logits at every size."""
    net = Net(pool=pool)
    constant = torch.randn(2, 4, 1, 1)
    want = net.fc(constant.expand(-1, -1, 6, 6).flatten(1))
    timm_resize.resize_(net, size)
    got = net.fc(constant.expand(-1, -1, size[0] // 8, size[1] // 8).flatten(1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [(9, 14), (12, 12), (4, 5), (7, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pooled_reading_is_an_adaptive_average_pool(new, channels_last):
    """With `pool` the new weight does what torch's own pool before the old weight does."""
    weight, x = torch.randn(5, 4 * 36), torch.randn(2, 4, *new)
    pooled = F.adaptive_avg_pool2d(x, (6, 6))
    flat = [(m.permute(0, 2, 3, 1) if channels_last else m).flatten(1) for m in (pooled, x)]
    how = flatten_linear((6, 6), new, channels=4, channels_last=channels_last, pool=True)
    torch.testing.assert_close(flat[1] @ how(weight).T, flat[0] @ weight.T, rtol=1e-4, atol=1e-4)


def test_trains_and_returns():
    """The optimizer follows, the same Parameter trains on, and the untouched way back restores every bit."""
    net = Net()
    weight, before = net.fc.weight, net.fc.weight.detach().clone()
    timm_resize.resize_(net, (96, 64))
    timm_resize.resize_(net, 48)
    assert net.fc.weight is weight
    assert torch.equal(weight, before)
    optimizer = torch.optim.Adam(net.parameters())
    for size in (48, 96):
        timm_resize.resize_(net, size, optimizer=optimizer)
        before = weight.detach().clone()
        net(image((size, size))).square().sum().backward()
        optimizer.step()
        assert net.fc.weight is weight
        assert (weight != before).all()


def test_errors():
    """A size with no cell names one that works; a layer that does not read the map is named."""
    net = Net()
    with pytest.raises(timm_resize.InvalidSizeError) as caught:
        timm_resize.resize_(net, 7)
    assert str(caught.value) == "Net: img_size=(7, 7) is smaller than a cell of 8 pixels. Use 8."
    net.fc = nn.Linear(145, 5)
    with pytest.raises(timm_resize.UnsupportedModelError) as caught:
        timm_resize.resize_(net, 64)
    assert str(caught.value) == (
        "Net: fc reads 145 features, no multiple of a 6x6 map. Give the map that it was made for."
    )


@pytest.mark.parametrize("name", ["resnet18", "mvitv2_tiny"])
def test_a_model_inside(name):
    """A user's module that holds a timm model is resized as one, and the inner model as it would be alone."""
    net, alone = Wrapper(name), timm.create_model(name, num_classes=0, global_pool="")
    plan, inner = timm_resize.resize_(net, (64, 96)), timm_resize.resize_(alone, (64, 96))
    assert {c.key for c in plan} >= {f"encoder.{c.key}" for c in inner}
    assert net.encoder._traits == alone._traits
    assert (net.encoder._model_args, net.fc.in_features) == (alone._model_args, 512 * 2 * 3)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_smaller_map_is_read_enlarged_as_asked(mode):
    """By the interpolation asked for: what the old weight says of the map that torch enlarges."""
    weight, small = torch.randn(5, 2 * 36, dtype=torch.float64), torch.randn(1, 2, 3, 3, dtype=torch.float64)
    new = flatten_linear((6, 6), (3, 3), channels=2, mode=mode, antialias=False)(weight)
    enlarged = F.interpolate(small, size=(6, 6), mode=mode)
    torch.testing.assert_close(small.flatten(1) @ new.T, enlarged.flatten(1) @ weight.T)
