"""A switch of size under DistributedDataParallel, in two processes that talk over the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch.distributed.fsdp

import timm_resize
from tests.helpers.oracle import stock

WORKER = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import timm, timm_resize

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", rank=rank, world_size=2)


def done():
    dist.barrier()
    print("done")


torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=48, num_classes=2)
ddp = DistributedDataParallel(model, find_unused_parameters=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(size):
    torch.manual_seed(100 + rank)  # other images on each rank
    optimizer.zero_grad()
    ddp(torch.randn(2, 3, *size)).square().mean().backward()
    for name, p in model.named_parameters():
        mean = p.grad.clone()
        dist.all_reduce(mean)
        assert torch.allclose(p.grad, mean / 2, atol=1e-6), name
    optimizer.step()


step((64, 64))
for refuse in (lambda: timm_resize.resize_(ddp, 96), lambda: timm_resize.resize_ddp(model, 96)):
    try:
        refuse()
    except timm_resize.UnsupportedModelError as error:
        print(error)
try:
    timm_resize.resize_ddp(ddp, 8)
except timm_resize.InvalidSizeError:
    step((64, 64))
table = model.pos_embed
for size in ((96, 96), (48, 64)):
    ddp = timm_resize.resize_ddp(ddp, size, optimizer=optimizer)
    assert ddp.find_unused_parameters and ddp.module is model and model.pos_embed is table
    step(size)
    step(size)
for p in model.parameters():
    mine = p.detach().clone()
    dist.broadcast(mine, 0)
    assert torch.equal(mine, p)
done()
"""


SHARDED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

mesh = init_device_mesh("cpu", (2,))


def build(size=(64, 64)):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, depth=2, embed_dim=48, num_heads=3, num_classes=2)


def shard(model):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def build_optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)  # or the noise of a gradient of zero counts


def images(size, seed):
    return torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(seed))


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


plain, sharded = build(), build()
shard(sharded)
one, two = build_optimizer(plain.parameters()), build_optimizer(sharded.parameters())
try:
    timm_resize.resize_(sharded, 96)
except timm_resize.UnsupportedModelError as error:
    print(error)
try:
    timm_resize.resize_fsdp(sharded, 8, build=build, shard=shard)
except timm_resize.InvalidSizeError as error:
    print(error)
now = (64, 64)
for size in ((64, 64), (96, 96), (48, 64)):
    if size != now:
        timm_resize.resize_(plain, size, optimizer=one)
        sharded, two = timm_resize.resize_fsdp(sharded, size, build=lambda: build(now), shard=shard, optimizer=two,
                                               build_optimizer=build_optimizer)
        now = size
    for seed in (1, 2):
        x = images(size, seed)
        step(plain, one, x)  # the whole batch in one process
        step(sharded, two, x[2 * rank : 2 * rank + 2])  # half of it on each rank
    for (name, whole), part in zip(plain.named_parameters(), sharded.parameters()):
        assert isinstance(part, DTensor) and part.full_tensor().shape == whole.shape
        assert torch.allclose(part.full_tensor(), whole, atol=1e-4), name
        moments, theirs = one.state[whole], two.state[part]
        assert moments["step"] == theirs["step"]
        assert torch.allclose(theirs["exp_avg"].full_tensor(), moments["exp_avg"], atol=1e-4), name
done()
"""

CAN_SHARD = hasattr(torch.distributed.fsdp, "fully_shard")


@pytest.fixture(scope="module")
def printed():
    """What each of two ranks printed in both programs, which run one after the other in the same two processes."""
    if sys.platform == "win32":
        pytest.skip("gloo over the loopback")
    return both_ranks([WORKER, SHARDED] if CAN_SHARD else [WORKER])


def test_two_processes(printed):
    """Gradients are averaged over the ranks before and after each switch, and all ranks end at the same weights."""
    for lines, *_ in printed:
        assert lines[0].endswith(
            "Call timm_resize.resize_ddp on every rank: it resizes model.module and wraps it again."
        )
        assert lines[1].startswith("VisionTransformer: not a DistributedDataParallel. Use timm_resize.resize_")


@pytest.mark.skipif(not CAN_SHARD, reason="torch before 2.6 has no fully_shard")
def test_two_processes_that_share_the_parameters(printed):
    """A sharded model goes on, through two switches, as one that a single process trains with the whole batch."""
    for _, lines in printed:
        assert lines[0].endswith(
            "Call timm_resize.resize_fsdp on every rank: it gathers the weights, resizes and shards them anew."
        )
        assert "is smaller than patch_size=16" in lines[1]


def both_ranks(programs):
    """Run programs as two ranks; returns for each rank the lines that each program printed before "done"."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    code = "".join([*programs, "dist.destroy_process_group()\n"])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank)], env=env, **pipes) for rank in range(2)]
    printed = []
    for rank in ranks:
        out, err = rank.communicate(timeout=240)
        parts = out.split("done\n")
        assert len(parts) == len(programs) + 1, err
        assert (rank.returncode, parts[-1]) == (0, ""), err
        printed.append([part.splitlines() for part in parts[:-1]])
    return printed


def test_a_plain_model_is_refused():
    """The helper for wrapped models names the call for plain ones."""
    with pytest.raises(timm_resize.UnsupportedModelError, match="Use timm_resize.resize_ for a plain model"):
        timm_resize.resize_ddp(stock("resnet18"), 96)
    with pytest.raises(timm_resize.UnsupportedModelError, match=r"not sharded\. Use timm_resize\.resize_"):
        timm_resize.resize_fsdp(stock("resnet18"), 96, build=lambda: None, shard=lambda model: None)
