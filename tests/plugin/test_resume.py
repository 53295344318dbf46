"""timm's own functions that resume training, with the plugin in: from another size, all of it or nothing."""

from __future__ import annotations

import argparse

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import resume_checkpoint
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

import timm_resize
from tests.helpers.oracle import image

TINY = {"depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 2}
NAME = "vit_tiny_patch16_224"


def at(size, seed=0, name=NAME, **kwargs):
    """A small model, its optimizer, and the task that trains it."""
    torch.manual_seed(seed)
    model = timm.create_model(name, img_size=size, **{**(TINY if name == NAME else {"num_classes": 2}), **kwargs})
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    return task, torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What timm's saver wrote after two steps at 64 px with an EMA copy, and the model, the optimizer and the copy."""
    folder = tmp_path_factory.mktemp("run")
    with timm_resize.install():
        task, optimizer = at(64)
        ema = task.setup_ema(decay=0.5)
        for step in range(2):
            task(image((64, 64), batch=2, seed=step), torch.tensor([0, 1]))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
        args = argparse.Namespace(model=NAME, img_size=64)
        CheckpointSaver(task.trainable_module, optimizer, args, checkpoint_dir=str(folder), task=task).save_checkpoint(
            3
        )
    return str(folder / "last.pth.tar"), task.trainable_module, optimizer, ema.module


@pytest.fixture(autouse=True)
def _plugin():
    with timm_resize.install():
        yield


def resized(pos_embed):
    """timm's own resampling of a table of 64 px to 96 px."""
    return resample_abs_pos_embed(pos_embed, [6, 6], [4, 4], num_prefix_tokens=1)


def state(model, optimizer):
    """Copies of all that a resume writes to."""
    moments = [t.clone() for s in optimizer.state.values() for t in s.values()]
    return {k: v.clone() for k, v in model.state_dict().items()}, moments


def same(one, other):
    (weights, moments), (weights2, moments2) = one, other
    return all(torch.equal(v, weights2[k]) for k, v in weights.items()) and len(moments) == len(moments2)


@pytest.mark.parametrize("through", ["task", "model"])
def test_a_run_goes_on_at_another_size(through, saved):
    """Weights, momentum and epoch come from the file: what depends on the size resampled as timm does it."""
    path, before, old, averaged = saved
    task, optimizer = at(96, seed=1)
    model = task.trainable_module
    if through == "task":
        assert resume_task_checkpoint(task, path, optimizer) == 4
        load_task_ema_checkpoint((task, task.setup_ema())[0], path)
        ema = task.get_trainable_module(ema=True).module
        torch.testing.assert_close(ema.pos_embed, resized(averaged.pos_embed), atol=1e-6, rtol=1e-5)
        assert torch.equal(ema.head.weight, averaged.head.weight)
    else:
        assert resume_checkpoint(model, path, optimizer) == 4
    torch.testing.assert_close(model.pos_embed, resized(before.pos_embed), atol=1e-6, rtol=1e-5)
    assert torch.equal(model.blocks[0].attn.qkv.weight, before.blocks[0].attn.qkv.weight)
    first = optimizer.state[model.pos_embed]["exp_avg"]
    torch.testing.assert_close(first, resized(old.state[before.pos_embed]["exp_avg"]), atol=1e-6, rtol=1e-5)
    assert optimizer.state[model.head.weight]["step"] == 2


def test_the_same_size_is_stocks(saved):
    """Nothing is resized, and the bits are those of the file."""
    path, before, _, _ = saved
    task, optimizer = at(64, seed=1)
    assert resume_task_checkpoint(task, path, optimizer, None, False) == 4
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in task.trainable_module.state_dict().items())


def test_a_bare_state_dict_resumes_too(saved, tmp_path):
    """Files that hold nothing but weights give no epoch, as stock's."""
    torch.save(saved[1].state_dict(), tmp_path / "bare.pth")
    for resume in (resume_task_checkpoint, lambda task, path: resume_checkpoint(task.trainable_module, path)):
        task, _ = at(96, seed=1)
        assert resume(task, str(tmp_path / "bare.pth")) is None
        want = resized(saved[1].pos_embed)
        torch.testing.assert_close(task.trainable_module.pos_embed, want, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_loaded_leaves_all_as_it_was(saved):
    """A scaler that refuses its state comes last in stock; model and optimizer are as before all the same."""

    class Refuses:
        state_dict_key = "saver"

        def load_state_dict(self, state_dict):
            raise KeyError("injected")

    task, optimizer = at(96, seed=1)
    before = state(task.trainable_module, optimizer)
    with pytest.raises(KeyError, match="injected"):
        resume_task_checkpoint(task, saved[0], optimizer, Refuses())
    assert same(before, state(task.trainable_module, optimizer))
    other, optimizer = at(96, depth=2)
    with pytest.raises(timm_resize.CheckpointError):
        resume_task_checkpoint(other, saved[0], optimizer)


def test_models_of_anybody_resume_as_in_stock(tmp_path):
    """A module that is none of timm's, and a missing file, are stock's affair."""
    net = torch.nn.Linear(2, 2)
    torch.save({"state_dict": net.state_dict(), "epoch": 1}, tmp_path / "net.pth")
    other = torch.nn.Linear(2, 2)
    assert resume_checkpoint(other, str(tmp_path / "net.pth")) == 1
    assert torch.equal(other.weight, net.weight)
    with pytest.raises(FileNotFoundError):
        resume_checkpoint(other, str(tmp_path / "none.pth"))
