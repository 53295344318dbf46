"""A switch of size under DistributedDataParallel, in two processes that talk over the loopback."""

from __future__ import annotations

import functools
import os
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import timm_resize
from tests.helpers.forks import in_forks
from tests.helpers.oracle import stock

CAN_SHARD = hasattr(torch.distributed.fsdp, "fully_shard")


def replicated(rank):
    """Train on images of each rank's own, at three sizes, all ranks alike; returns what was refused on the way."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=48, num_classes=2)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(size):
        torch.manual_seed(100 + rank)
        optimizer.zero_grad()
        ddp(torch.randn(2, 3, *size)).square().mean().backward()
        for name, p in model.named_parameters():
            mean = p.grad.clone()
            dist.all_reduce(mean)
            assert torch.allclose(p.grad, mean / 2, atol=1e-6), name
        optimizer.step()

    step((64, 64))
    texts = []
    for refuse in (lambda: timm_resize.resize_(ddp, 96), lambda: timm_resize.resize_ddp(model, 96)):
        with pytest.raises(timm_resize.UnsupportedModelError) as caught:
            refuse()
        texts.append(str(caught.value))
    with pytest.raises(timm_resize.InvalidSizeError):
        timm_resize.resize_ddp(ddp, 8)
    step((64, 64))
    table = model.pos_embed
    for size in ((96, 96), (48, 64)):
        assert timm_resize.resize_ddp(ddp, size, optimizer=optimizer) is ddp
        assert ddp.find_unused_parameters
        assert ddp.module is model
        assert model.pos_embed is table
        step(size)
        step(size)
    for p in model.parameters():
        mine = p.detach().clone()
        dist.broadcast(mine, 0)
        assert torch.equal(mine, p)
    settings(model)
    return texts


def settings(model):
    """A wrapper's settings and hooks are what they were, and what cannot be kept is refused."""
    sizes = []

    def hook(state, bucket):
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    group = dist.new_group([0, 1])
    ddp = DistributedDataParallel(
        model, process_group=group, bucket_cap_mb=7, static_graph=True, gradient_as_bucket_view=True
    )
    ddp.register_comm_hook(None, hook)
    ddp.register_forward_hook(lambda *_: sizes.append("forward"))
    for size in (48, 64, 80):
        timm_resize.resize_ddp(ddp, size)
        sizes.clear()
        ddp(torch.randn(2, 3, size, size)).square().mean().backward()
        assert sizes[0] == "forward"
        assert sum(sizes[1:]) == sum(p.numel() for p in model.parameters())
    data = ddp._get_ddp_logging_data()
    assert (data["bucket_cap_bytes"], data["static_graph"], data["gradient_as_bucket_view"]) == (7 << 20, 1, 1)
    assert ddp.process_group is group
    del ddp
    built_in = DistributedDataParallel(model)
    built_in._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    with pytest.raises(timm_resize.UnsupportedModelError, match="ALLREDUCE cannot be asked for again"):
        timm_resize.resize_ddp(built_in, 96)
    assert model.patch_embed.img_size == (80, 80)


def sharded(rank):
    """Train one model whole and one in shards, at three sizes, to the same weights; returns what was refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    kwargs = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 2}

    def build(size=(64, 64)):
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=size, **kwargs)

    def shard(model):
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def build_optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)  # or the noise of a gradient of zero counts

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    plain, parts = build(), build()
    shard(parts)
    one, two = build_optimizer(plain.parameters()), build_optimizer(parts.parameters())
    with pytest.raises(timm_resize.UnsupportedModelError) as direct:
        timm_resize.resize_(parts, 96)
    with pytest.raises(timm_resize.InvalidSizeError) as small:
        timm_resize.resize_fsdp(parts, 8, build=build, shard=shard)
    now = (64, 64)
    for size in ((64, 64), (96, 96), (48, 64)):
        if size != now:
            timm_resize.resize_(plain, size, optimizer=one)
            how = {"build": functools.partial(build, now), "shard": shard, "build_optimizer": build_optimizer}
            parts, two = timm_resize.resize_fsdp(parts, size, optimizer=two, **how)
            now = size
        for seed in (1, 2):
            x = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(seed))
            step(plain, one, x)  # the whole batch in one process
            step(parts, two, x[2 * rank : 2 * rank + 2])  # half of it on each rank
        for (name, whole), part in zip(plain.named_parameters(), parts.parameters(), strict=True):
            assert isinstance(part, DTensor)
            assert part.full_tensor().shape == whole.shape
            assert torch.allclose(part.full_tensor(), whole, atol=1e-4), name
            moments, theirs = one.state[whole], two.state[part]
            assert moments["step"] == theirs["step"]
            assert torch.allclose(theirs["exp_avg"].full_tensor(), moments["exp_avg"], atol=1e-4), name
    return [str(direct.value), str(small.value)]


def both(rank, port):
    """Be one of two ranks, in both programs one after the other."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"})
    dist.init_process_group("gloo", rank=rank, world_size=2)
    texts = replicated(rank), sharded(rank) if CAN_SHARD else []
    dist.barrier()
    dist.destroy_process_group()
    return texts


@pytest.fixture(scope="module")
def refused():
    """What each of two ranks was refused in both programs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return in_forks(*(functools.partial(both, rank, port) for rank in range(2)))


def test_two_processes(refused):
    """Gradients are averaged over the ranks before and after each switch, and all ranks end at the same weights."""
    for (wrapped, plain), _ in refused:
        assert wrapped.endswith("Call timm_resize.resize_ddp on every rank: it resizes model.module and the buckets.")
        assert plain.startswith("VisionTransformer: not a DistributedDataParallel. Use timm_resize.resize_")


@pytest.mark.skipif(not CAN_SHARD, reason="torch before 2.6 has no fully_shard")
def test_two_processes_that_share_the_parameters(refused):
    """A sharded model goes on, through two switches, as one that a single process trains with the whole batch."""
    for _, (direct, small) in refused:
        assert direct.endswith(
            "Call timm_resize.resize_fsdp on every rank: it gathers the weights, resizes and shards them anew."
        )
        assert "is smaller than patch_size=16" in small


def test_a_plain_model_is_refused():
    """The helper for wrapped models names the call for plain ones."""
    with pytest.raises(timm_resize.UnsupportedModelError, match="Use timm_resize.resize_ for a plain model"):
        timm_resize.resize_ddp(stock("test_resnet"), 96)
    with pytest.raises(timm_resize.UnsupportedModelError, match=r"not sharded\. Use timm_resize\.resize_"):
        timm_resize.resize_fsdp(stock("test_resnet"), 96, build=lambda: None, shard=lambda model: None)
