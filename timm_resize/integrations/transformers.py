"""transformers: a callback for its Trainer that follows a schedule of sizes, and a way back into its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import Unpack

from timm_resize.core.find import current_size, find_model
from timm_resize.core.request import ResizeOptions
from timm_resize.errors import CheckpointError, ResizeError
from timm_resize.geometry import Size
from timm_resize.resize import resize_
from timm_resize.training.distributed import resize_ddp
from timm_resize.training.schedule import SizeSchedule
from timm_resize.weights.checkpoint import read_checkpoint, saved_size

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "timm_resize.integrations.transformers needs transformers' Trainer: pip install 'transformers[torch]'"
    ) from error


class ResizeCallback(TrainerCallback):
    """Move the model that a Trainer trains to each epoch's size, and its optimizer with it.

    Args:
        schedule: The size of every epoch; snapped to those that the model allows.
        on_size: Called with (H, W) before the first epoch and after each change, before the epoch's first batch is
            made: set the transform there. Workers that persist do not see it.
        trainer: The Trainer, needed in more than one process, where its wrapper follows too.
        **options: As for `plan_resize`.
    """

    def __init__(
        self,
        schedule: SizeSchedule,
        *,
        on_size: Callable[[Size], object] | None = None,
        trainer: Trainer | None = None,
        **options: Unpack[ResizeOptions],
    ) -> None:
        self.schedule, self.on_size, self.trainer, self.options = schedule, on_size, trainer, options
        self._announced: Size | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Snap the schedule to sizes that the model allows."""
        if args.world_size > 1 and self.trainer is None:
            raise ResizeError("ResizeCallback: the model is wrapped for several processes. Give trainer=.")
        self._snapped = self.schedule.snapped(kwargs["model"], **self.options)
        self._announced = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go to the epoch's size, before its first batch is made."""
        size = self._snapped.size(int(state.epoch or 0))
        model: nn.Module = kwargs["model"]
        optimizer: Optimizer = kwargs["optimizer"]
        if current_size(find_model(model)) != size:
            wrapped = model if self.trainer is None else self.trainer.model_wrapped
            if isinstance(wrapped, DistributedDataParallel):
                resize_ddp(wrapped, size, optimizer=optimizer, **self.options)
            else:
                resize_(model, size, optimizer=optimizer, **self.options)
        if self._announced != size and self.on_size is not None:
            self.on_size(size)
        self._announced = size


def resize_to_checkpoint_(model: nn.Module, folder: str | os.PathLike[str]) -> Size:
    """Bring a model to the size of a Trainer's checkpoint, for `trainer.train(resume_from_checkpoint=folder)`.

    Args:
        model: The model that the Trainer was, or will be, given.
        folder: A `checkpoint-*` folder.

    Returns:
        The size (H, W) of its weights.

    Raises:
        CheckpointError: There is no file of weights, or it is of another model, or fits no size that is known.
    """
    root, places = find_model(model), [Path(folder, n) for n in ("model.safetensors", "pytorch_model.bin")]
    path = next((place for place in places if place.is_file()), None)
    size = None if path is None else saved_size(read_checkpoint(path), root)
    if size is None:
        raise CheckpointError(f"{type(root).__name__}: folder={os.fspath(folder)!r} holds no weights of a known size.")
    resize_(model, size)
    return size
