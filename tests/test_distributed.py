"""A switch of size under DistributedDataParallel, in two processes that talk over the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

import timm_resize
from tests.oracle import stock

WORKER = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import timm, timm_resize

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", rank=rank, world_size=2)
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
dist.destroy_process_group()
print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over the loopback")
def test_two_processes():
    """Gradients are averaged over the ranks before and after each switch, and all ranks end at the same weights."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank)], env=env, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) for rank in range(2)]  # fmt: skip
    for rank in ranks:
        out, err = rank.communicate(timeout=240)
        lines = out.splitlines()
        assert lines[-1] == "done", err
        assert "unwrap, resize_ on every rank, wrap again" in lines[0]
        assert lines[1].startswith("VisionTransformer: not a DistributedDataParallel. Use timm_resize.resize_")


def test_a_plain_model_is_refused():
    """The helper for wrapped models names the call for plain ones."""
    with pytest.raises(timm_resize.UnsupportedModelError, match="Use timm_resize.resize_ for a plain model"):
        timm_resize.resize_ddp(stock("resnet18"), 96)
