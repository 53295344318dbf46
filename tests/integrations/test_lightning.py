"""Lightning's own Trainer with our callback and mixin, against loops that are written out."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch.utils.data import DataLoader, Dataset, Subset

import timm_resize
from tests.helpers.oracle import image

pytest.importorskip("lightning", reason="lightning is not installed")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from timm_resize.integrations.lightning import AnySize, ResizeCallback

pytestmark = pytest.mark.filterwarnings("ignore")


class Images(Dataset):
    """Four images, each made at the size that the transform says."""

    transform = staticmethod(lambda seed: image((64, 64), seed=seed)[0])

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(index), index % 2


def at(size):
    """The transform that makes an image of that size."""
    return lambda seed: image(size, seed=seed)[0]


class Net(AnySize, pl.LightningModule):
    """What people write, with the mixin."""

    def __init__(self, img_size=64):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        kwargs = {"depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 2}
        self.net = timm.create_model("vit_tiny_patch16_224", img_size=img_size, **kwargs)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(tuple(batch[0].shape[-2:]))
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.seen.append(("val", *batch[0].shape[-2:]))
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(net, epochs, *callbacks, loader=None, ckpt_path=None, folder=None, **kwargs):
    """Run the Trainer quietly; return it."""
    kwargs = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            default_root_dir=folder, devices=1, **kwargs,
        )  # fmt: skip
        trainer.fit(net, loader or DataLoader(Images(), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def steps(model, optimizer, size, average=None, count=None):
    """An epoch, written out."""
    for first in (0, 2):
        x = torch.cat([image(size, seed=s) for s in (first, first + 1)])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        optimizer.step()
        if average is not None:
            average.update_parameters(model)


def same(a, b):
    """Whether two models hold nearly the same."""
    for name, p in a.state_dict().items():
        torch.testing.assert_close(p, b.state_dict()[name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_schedule_is_the_loop_that_resizes():
    """Model, optimizer and running average are those of a loop with `resize_` between its epochs."""
    net, told, average = Net(), [], WeightAveraging()
    schedule = timm_resize.SizeSchedule.steps({0: 64, 1: (96, 64)}, epochs=2)
    resize = ResizeCallback(schedule, transform=at, on_size=lambda trainer, size: told.append(size))
    trainer = fit(net, 2, resize, average)
    assert net.seen == [(64, 64)] * 2 + [(96, 64)] * 2
    assert told == [(64, 64), (96, 64)]
    assert (trainer.callback_metrics["img_height"], trainer.callback_metrics["img_width"]) == (96, 64)
    model = Net().net
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ema = torch.optim.swa_utils.AveragedModel(model)
    steps(model, optimizer, (64, 64), ema)
    timm_resize.resize_(model, (96, 64), optimizer=optimizer, ema=ema)
    steps(model, optimizer, (96, 64), ema)
    same(net.net, ema.module)  # which Lightning puts into the model in the end
    moments = trainer.optimizers[0].state[net.net.pos_embed]["exp_avg_sq"]
    torch.testing.assert_close(moments, optimizer.state[model.pos_embed]["exp_avg_sq"], atol=1e-8, rtol=1e-4)


def test_the_average_of_swa_follows():
    """Lightning's SWA averages the weights of every epoch's start, those of a smaller size resampled as timm does."""
    schedule = timm_resize.SizeSchedule.steps({0: 64, 2: 96}, epochs=3)
    swa, tables = StochasticWeightAveraging(1e-3, swa_epoch_start=1, annealing_epochs=1), []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            table = module.net.pos_embed.detach().clone()
            tables.append(table if table.shape[1] == 37 else resized(table))

    fit(Net(), 3, ResizeCallback(schedule, transform=at), Look(), swa)
    mean = sum(tables) / 3
    torch.testing.assert_close(swa._average_model.net.pos_embed, mean, atol=1e-6, rtol=1e-5)


def test_validation_data_follow_too():
    """With val_transform the validation images have the epoch's size; a Subset is looked into."""
    net = Net()
    schedule = timm_resize.SizeSchedule.steps({0: 64, 1: 96}, epochs=2)
    train, val = (DataLoader(Subset(Images(), [0, 1]), batch_size=2) for _ in range(2))
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[ResizeCallback(schedule, transform=at, val_transform=at)],
    )  # fmt: skip
    trainer.fit(net, train, val)
    assert net.seen == [(64, 64), ("val", 64, 64), (96, 96), ("val", 96, 96)]


def test_a_loader_that_cannot_be_told_is_refused():
    """Workers that persist hold the old transform, so does data without one: neither trains at the wrong size."""
    schedule = timm_resize.SizeSchedule.steps({0: 64, 1: 96}, epochs=2)
    bare = DataLoader([(image((64, 64))[0], 0)])
    kept = DataLoader(Images(), num_workers=1, persistent_workers=True)
    for loader in (bare, kept):
        with pytest.raises(timm_resize.ResizeError, match="transform= cannot reach the data"):
            fit(Net(), 2, ResizeCallback(schedule, transform=at), loader=loader)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of Lightning's after an epoch at 64, with its running average."""
    path = tmp_path_factory.mktemp("lightning") / "a.ckpt"
    net = Net()
    trainer = fit(net, 1, WeightAveraging())
    trainer.save_checkpoint(path)
    return path, net, trainer


def resized(table):
    """timm's own resampling of a table of 64 px to 96 px."""
    return resample_abs_pos_embed(table, [6, 6], [4, 4], num_prefix_tokens=1)


def test_load_from_checkpoint_at_another_size(saved):
    """A module of 96 px takes the weights of 64 px, resampled as timm does it."""
    path, net, _ = saved
    again = Net.load_from_checkpoint(path, img_size=96)
    torch.testing.assert_close(again.net.pos_embed, resized(net.net.pos_embed), atol=1e-6, rtol=1e-5)
    assert torch.equal(Net.load_from_checkpoint(path).net.pos_embed, net.net.pos_embed)


def test_fit_goes_on_from_another_size(saved):
    """`fit(ckpt_path=)`: weights, momentum and running average are resized, and the epoch counts on."""
    path, _, trainer = saved
    net, average, found = Net(img_size=96), WeightAveraging(), {}

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            state = trainer.optimizers[0].state[module.net.pos_embed]
            found.update(moment=state["exp_avg"].clone(), epoch=trainer.current_epoch)
            found["average"] = average._average_model.module.net.pos_embed.clone()

    wide = DataLoader(Images(), batch_size=2)
    wide.dataset.transform = at((96, 96))
    fit(net, 2, average, Look(), loader=wide, ckpt_path=path)
    old = saved[1].net.pos_embed
    before = trainer.optimizers[0].state[old]["exp_avg"]
    torch.testing.assert_close(found["moment"], resized(before), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["average"], resized(old), atol=1e-6, rtol=1e-5)
    assert found["epoch"] == 1


def test_a_schedule_goes_on_where_it_was(saved):
    """Under a ResizeCallback the module takes the checkpoint's size, and the schedule leads on from there."""
    net = Net(img_size=32)
    schedule = timm_resize.SizeSchedule.steps({0: 64, 1: 96}, epochs=2)
    fit(net, 2, WeightAveraging(), ResizeCallback(schedule, transform=at), ckpt_path=saved[0])
    assert net.seen == [(96, 96)] * 2
    assert net.net.patch_embed.img_size == (96, 96)
