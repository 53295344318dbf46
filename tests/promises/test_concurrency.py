"""Threads and processes that get in each other's way: every answer is right."""

from __future__ import annotations

import copy
import functools
import os
import random
import signal
import threading

import pytest
import timm
import torch
from timm.models import _factory

import timm_resize
from tests.helpers.forks import in_forks
from tests.helpers.oracle import image, stock
from timm_resize.core import locks, transaction
from timm_resize.hub.save import stock_misfit


def in_threads(count, work):
    """Run `work(index)` in threads that start together; raises what any of them raised."""
    barrier, errors = threading.Barrier(count), []

    def run(index):
        barrier.wait()
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_install_and_uninstall_while_models_are_made():
    """Eight threads install, create, resize and uninstall; each gets its model, and timm is stock in the end."""
    before = {
        name: getattr(_factory, name) for name in ("_resolve_model_source", "model_entrypoint", "load_checkpoint")
    }
    code = timm.data.resolve_data_config.__code__, timm.models.load_checkpoint.__code__

    def work(index):
        for turn in range(3):
            size = 96 + 32 * ((index + turn) % 3)
            with timm_resize.install():
                model = timm.create_model("levit_128s", img_size=size, num_classes=2, depth=(1, 1, 1))
                model.set_input_size(size + 32)
            assert timm_resize.data_config(model)["input_size"] == (3, size + 32, size + 32)

    in_threads(8, work)
    assert {name: getattr(_factory, name) for name in before} == before
    assert (timm.data.resolve_data_config.__code__, timm.models.load_checkpoint.__code__) == code
    assert not hasattr(timm.models.levit.Levit, "set_input_size")


class Waiting:
    """A hook that stops a layer in the middle of its first forward until it may go on."""

    def __init__(self):
        self.inside, self.go = threading.Event(), threading.Event()

    def __call__(self, module, args):
        if not self.inside.is_set():
            self.inside.set()
            assert self.go.wait(60)


@pytest.mark.parametrize("size", [(224, 224), (192, 160)], ids=["own size", "another"])
def test_what_goes_on_while_a_thread_runs_a_size(size):
    """Halfway through a forward other sizes come, all are evicted and forgotten: it goes on as if it were alone."""
    model = stock("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), num_classes=2)
    alone = {s: resized(model, s)(image(s)) for s in (size, (96, 128), (128, 128))}
    layer, got = Waiting(), []
    model.layers[1].blocks[0].norm1.register_forward_pre_hook(layer)
    multi = timm_resize.MultiSize(model, max_bytes=0)  # the last used size alone is kept

    def forward():
        with torch.no_grad():
            got.append(multi(image(size)))

    thread = threading.Thread(target=forward)
    thread.start()
    assert layer.inside.wait(60)
    with torch.no_grad():
        for other in ((96, 128), (128, 128), size):
            torch.testing.assert_close(multi(image(other)), alone[other], rtol=1e-6, atol=1e-6)
            multi.clear()
    layer.go.set()
    thread.join()
    torch.testing.assert_close(got[0], alone[size], rtol=1e-6, atol=1e-6)


def test_sizes_come_and_go_in_eight_threads():
    """First uses, evictions and clear() at once, in an order of each thread's own: every output is that of its size."""
    model = stock("levit_128s", embed_dim=(32, 48, 64), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1))
    sizes = [(64, 64), (64, 96), (96, 64), (96, 96), (128, 64), (224, 224)]
    alone = {size: resized(model, size)(image(size)) for size in sizes}
    multi = timm_resize.MultiSize(model, max_bytes=30_000)

    def work(seed):
        pick = random.Random(seed)
        with torch.inference_mode():
            for _ in range(20):
                size = pick.choice(sizes)
                torch.testing.assert_close(multi(image(size)), alone[size], rtol=1e-6, atol=1e-6)
                assert multi.nbytes >= 0
                assert set(multi.sizes) <= set(sizes)
                if pick.random() < 0.1:
                    multi.clear()

    in_threads(8, work)
    assert multi.nbytes <= 30_000


@torch.no_grad()
def resized(model, size):
    """A model of its own at the size."""
    own = copy.deepcopy(model)
    timm_resize.resize_(own, size)
    return own


def test_several_threads_resize_one_model():
    """Resizes take turns: in the end the model is whole, at one of the sizes, with the values of that size."""
    model = stock("vit_tiny_patch16_224", depth=1, num_classes=2)
    wants = {}
    for size in (96, 128, 160, 192):
        theirs = stock("vit_tiny_patch16_224", depth=1, num_classes=2)
        theirs.load_state_dict(model.state_dict())
        theirs.set_input_size((size, size))  # stock's own
        wants[(size, size)] = theirs.pos_embed
    in_threads(4, lambda index: [timm_resize.resize_(model, 96 + 32 * ((index + i) % 4)) for i in range(20)])
    size = model.patch_embed.img_size
    torch.testing.assert_close(model.pos_embed, wants[size], atol=1e-5, rtol=0)
    with torch.no_grad():
        assert model(image(size)).isfinite().all()


def test_two_processes_save_to_one_folder(tmp_path):
    """They take turns: in the end the folder holds the files of one of them, whole, and nothing else."""

    def save_often(size):
        model = timm_resize.create_model("vit_tiny_patch16_224", img_size=size, depth=1, num_classes=2)
        for _ in range(15):
            timm_resize.save_pretrained(model, tmp_path)

    in_forks(functools.partial(save_often, 96), functools.partial(save_often, 160))
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert stock_misfit(tmp_path) is None


def in_a_fork(work):
    """Run `work` in a forked child and assert that it passes; a child that hangs is ended after a minute."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            torch.set_num_threads(1)  # OpenMP's threads are not in the child
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def halfway(monkeypatch):
    """Let a thread stop after the first write of its resize; yields what starts it, and the event to go on."""
    inside, go, threads = threading.Event(), threading.Event(), []
    write = transaction._write

    def stopping(do):
        write(do)
        if threading.current_thread() in threads and not inside.is_set():
            inside.set()
            assert go.wait(60)

    def start(model, size):
        threads.append(threading.Thread(target=timm_resize.resize_, args=(model, size)))
        threads[0].start()
        assert inside.wait(60)

    monkeypatch.setattr(transaction, "_write", stopping)
    yield start, go
    go.set()
    threads[0].join()


@needs_fork
def test_a_fork_while_a_thread_resizes(halfway, monkeypatch):
    """The thread, and what it will ever do, is not in the child, which resizes and serves sizes of its own."""
    monkeypatch.setattr(locks, "PATIENCE", 0.01)
    one, other = (stock("vit_tiny_patch16_224", depth=1, num_classes=2) for _ in range(2))
    multi, (start, _) = timm_resize.MultiSize(other), halfway
    start(one, 96)

    def work():
        assert multi.at(128).pos_embed.shape == (1, 65, 192)
        timm_resize.resize_(other, 160)
        assert other.pos_embed.shape == (1, 101, 192)

    with multi._making:  # the thread that forks goes on in the child, with what it holds
        in_a_fork(work)


@needs_fork
def test_a_fork_waits_for_the_end_of_a_resize(halfway, monkeypatch):
    """A child does not get a model that is half of either size."""
    monkeypatch.setattr(locks, "PATIENCE", 60)
    model, (start, go) = stock("vit_tiny_patch16_224", depth=1, num_classes=2), halfway
    start(model, 96)
    os.register_at_fork(before=go.set)  # runs before what was registered earlier

    def work():
        assert model.pos_embed.shape == (1, 37, 192)
        assert model.patch_embed.img_size == (96, 96)

    in_a_fork(work)


def test_a_backward_in_another_thread():
    """Sizes come, go and are forgotten between a forward and its backward: the gradients are those of one thread."""
    model = stock("vit_tiny_patch16_224", depth=1, num_classes=2)
    multi, sizes = timm_resize.MultiSize(model, max_bytes=0), ((224, 224), (96, 128), (128, 128))
    wants = {}
    for size in sizes:
        model.zero_grad()
        multi(image(size)).square().sum().backward()
        wants[size] = {name: p.grad.clone() for name, p in model.named_parameters()}
    total = {name: sum(want[name] for want in wants.values()) for name in wants[sizes[0]]}
    model.zero_grad()
    losses = [multi(image(size)).square().sum() for size in sizes]

    turn = threading.Lock()  # torch itself loses gradients where two threads add to one

    def work(index):
        with turn:
            losses[index].backward()
        with torch.no_grad():
            multi(image(sizes[index - 1]))
        multi.clear()

    in_threads(3, work)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, total[name], rtol=1e-4, atol=1e-5)
