"""transformers' own Trainer with our callback, against a loop that is written out."""

from __future__ import annotations

import pytest
import torch

import timm_resize
from tests.helpers.oracle import image

pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
pytest.importorskip("accelerate", reason="accelerate, which its Trainer needs, is not installed")
import transformers

from timm_resize.integrations.transformers import ResizeCallback, resize_to_checkpoint_

SCHEDULE = timm_resize.SizeSchedule.steps({0: 64, 1: (96, 64)}, epochs=2)


class Images(torch.utils.data.Dataset):
    """Four images of the present size."""

    size = (64, 64)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"pixel_values": image(self.size, seed=index)[0], "labels": index % 2}


def wrapper(size=64):
    """A small timm model in transformers' wrapper."""
    torch.manual_seed(0)
    args = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": size}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args, num_labels=2)
    return transformers.TimmWrapperForImageClassification(config)


def trainer(model, data, folder, epochs, callback):
    """The Trainer, in the order of the data, at a constant rate."""
    args = transformers.TrainingArguments(
        folder, num_train_epochs=epochs, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        lr_scheduler_type="constant", report_to=[], save_strategy="epoch", train_sampling_strategy="sequential",
        max_grad_norm=0.0, weight_decay=0.0, disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=data, callbacks=[callback])


def by_hand(model, size, optimizer):
    """An epoch, written out."""
    for first in (0, 2):
        x = torch.cat([image(size, seed=s) for s in (first, first + 1)])
        optimizer.zero_grad()
        model(pixel_values=x, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_a_schedule_is_the_loop_that_resizes(tmp_path):
    """Trained at two sizes, then resumed from the first epoch's checkpoint: both are the loop with `resize_` in it."""
    data, told = Images(), []

    def on_size(size):
        told.append(size)
        data.size = size

    model = wrapper()
    trainer(model, data, tmp_path, 2, ResizeCallback(SCHEDULE, on_size=on_size)).train()
    assert told == [(64, 64), (96, 64)]
    want = wrapper()
    optimizer = torch.optim.AdamW(want.parameters(), lr=1e-3, weight_decay=0.0)
    by_hand(want, (64, 64), optimizer)
    timm_resize.resize_(want, (96, 64), optimizer=optimizer)
    by_hand(want, (96, 64), optimizer)
    for name, value in want.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)
    again, folder = wrapper(96), tmp_path / "checkpoint-2"
    assert resize_to_checkpoint_(again, folder) == (64, 64)
    resumed = trainer(again, data, tmp_path / "again", 2, ResizeCallback(SCHEDULE, on_size=on_size))
    resumed.train(resume_from_checkpoint=str(folder))
    for name, value in want.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_folder_without_weights_is_refused(tmp_path):
    """The message names it."""
    with pytest.raises(timm_resize.CheckpointError, match="holds no weights of a known size"):
        resize_to_checkpoint_(wrapper(), tmp_path)
