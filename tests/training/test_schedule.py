"""Schedules of sizes against hand-written lists, and training that follows one."""

from __future__ import annotations

import pytest
import torch
from timm.utils import ModelEmaV3

import timm_resize
from tests.helpers.oracle import image, stock
from timm_resize import ProgressiveResize, SizeSchedule


def sides(schedule):
    return [size[0] for size in schedule.sizes]


def test_linear():
    """Equal steps, warm-up at full size first, the last epochs at full size; axes of their own."""
    assert sides(SizeSchedule.linear(128, 224, epochs=4)) == [128, 160, 192, 224]
    assert sides(SizeSchedule.linear(128, 224, epochs=6, warmup=1, final=2)) == [224, 128, 160, 192, 224, 224]
    assert sides(SizeSchedule.linear(128, 224, epochs=1)) == [224]
    assert SizeSchedule.linear((96, 64), (160, 128), epochs=3).sizes == ((96, 64), (128, 96), (160, 128))


def test_steps_and_cycles():
    """Given epochs, and a cycle that ends at its last size."""
    assert sides(SizeSchedule.steps({0: 96, 2: 160}, epochs=4)) == [96, 96, 160, 160]
    assert sides(SizeSchedule.cyclic([96, 128, 160], epochs=6, final=2)) == [96, 128, 160, 96, 160, 160]
    assert SizeSchedule.steps({0: 96}, epochs=2).size(99) == (96, 96)


def test_snapped_to_what_the_model_allows():
    """Each size becomes the nearest valid one: multiples of the patch for a ViT."""
    model = stock("vit_tiny_patch16_224", depth=1)
    assert sides(SizeSchedule.linear(100, 224, epochs=5).snapped(model)) == [96, 128, 160, 192, 224]


def test_batch_sizes():
    """As many pixels per batch at every size; with a model, its attention's scores count where they grow faster."""
    schedule = SizeSchedule.steps({0: 112, 1: 224}, epochs=2)
    assert schedule.batch_sizes(32) == {(112, 112): 128, (224, 224): 32}
    assert schedule.batch_sizes(32, multiple=48) == {(112, 112): 96, (224, 224): 48}
    model = stock("vit_tiny_patch16_224", depth=1)  # scores: 50² and 197² per head, a ratio of 15.5
    assert schedule.batch_sizes(32, model=model) == {(112, 112): 128, (224, 224): 32}
    growing = SizeSchedule.steps({0: 224, 1: 112}, epochs=2)
    assert growing.batch_sizes(32) == {(224, 224): 32, (112, 112): 128}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SizeSchedule.linear(64, 96, epochs=0), "epochs=0 is not a number of epochs. Use 1 or more"),
        (lambda: SizeSchedule.linear(64, 96, epochs=2, warmup=2), "epochs=2 is less than warmup=2 and final=1"),
        (lambda: SizeSchedule.linear(0, 96, epochs=2), "start=0"),
        (lambda: SizeSchedule.steps({1: 64}, epochs=2), "says nothing of epoch 0"),
        (lambda: SizeSchedule.cyclic([], epochs=2), "is empty"),
    ],
)
def test_errors(make, text):
    """Each mistake in a schedule is named."""
    with pytest.raises(timm_resize.ResizeError, match=text):
        make()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "levit_128s"])
def test_training_follows(name, caplog):
    """Model, optimizer and EMA move together at the right epochs; loader and transform are notified once per change."""
    kwargs = {"depth": 1} if name.startswith("vit") else {}
    model = stock(name, num_classes=2, **kwargs).train()
    optimizer, ema, calls, ran = torch.optim.AdamW(model.parameters(), lr=1e-3), ModelEmaV3(model), [], []
    schedule = SizeSchedule.steps({0: 64, 2: 96, 3: 128}, epochs=5)
    progress = ProgressiveResize(
        model,
        schedule,
        optimizer=optimizer,
        ema=ema,
        batch_size=4,
        on_size=lambda size, batch: calls.append((size, batch)),
    )
    with caplog.at_level("INFO", logger="timm_resize"):
        for epoch in range(5):
            progress.start_epoch(epoch)
            size, batch = calls[-1]
            optimizer.zero_grad()
            output = model(image(size, batch=batch))
            output = output[0] if isinstance(output, tuple) else output
            output.square().mean().backward()
            optimizer.step()
            ema.update(model)
            ran.append(timm_resize.data_config(ema.module)["input_size"][1])
    assert ran == [64, 64, 96, 128, 128]
    assert calls == [((64, 64), 16), ((96, 96), 7), ((128, 128), 4)]
    assert [r.message.split(",")[0] for r in caplog.records if r.message.startswith("epoch")] == [
        "epoch 0: image size 64x64",
        "epoch 2: image size 96x96",
        "epoch 3: image size 128x128",
    ]
    assert all(torch.isfinite(p).all() for p in model.parameters())
