"""Lightning: a callback that follows a schedule of sizes, and a mixin that opens checkpoints of other sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from timm_resize.core.find import current_size, find_model
from timm_resize.core.request import ResizeOptions
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, parse_size
from timm_resize.resize import resize_
from timm_resize.training.distributed import resize_ddp
from timm_resize.training.optimizer_state import resize_optimizer_state_dict
from timm_resize.training.schedule import SizeSchedule
from timm_resize.weights.names import by_own_names
from timm_resize.weights.source import source_geometry
from timm_resize.weights.state_dict import resize_state_dict

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("timm_resize.integrations.lightning needs Lightning: pip install lightning") from error

Transform = Callable[[Size], Callable[..., Any]]
KEY = "timm_resize_img_size"  # where a checkpoint keeps the image size (H, W) of its weights


class ResizeCallback(Callback):
    """Move the timm model in a LightningModule to each epoch's size, and with it all that follows.

    Optimizers, the averages of `StochasticWeightAveraging`, `WeightAveraging` and its kin, and under DDP the wrapper
    follow. The size is logged as `img_height` and `img_width`.

    Args:
        schedule: The size of every epoch; snapped to those that the model allows.
        transform: Size (H, W) → the training data's `transform` from then on; `val_transform` of the validation data.
        on_size: Called with (trainer, size) before the first epoch and after each change.
        **options: As for `plan_resize`.
    """

    def __init__(
        self,
        schedule: SizeSchedule,
        *,
        transform: Transform | None = None,
        val_transform: Transform | None = None,
        on_size: Callable[[Trainer, Size], object] | None = None,
        **options: Unpack[ResizeOptions],
    ) -> None:
        self.schedule, self.options = schedule, options
        self.transform, self.val_transform, self.on_size = transform, val_transform, on_size

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Snap the schedule to sizes that the model allows."""
        self._snapped = self.schedule.snapped(pl_module, **self.options)
        self._announced: Size | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the epoch's size, before its first batch is made."""
        size = self._snapped.size(trainer.current_epoch)
        data = (self.transform, trainer.train_dataloader), (self.val_transform, trainer.val_dataloaders)
        for transform, loaders in data:
            if self._announced != size and transform is not None:
                _set_transform(loaders, transform(size))
        if current_size(find_model(pl_module)) != size:
            _resize(trainer, pl_module, size, self.options)
        if self._announced != size and self.on_size is not None:
            self.on_size(trainer, size)
        self._announced = size
        pl_module.log_dict({"img_height": float(size[0]), "img_width": float(size[1])}, on_epoch=True, on_step=False)


class AnySize(LightningModule):
    """A LightningModule whose `load_from_checkpoint` and `fit(ckpt_path=)` take a checkpoint of another size.

    The module's size counts; under a `ResizeCallback`, whose schedule decides, it goes on at the checkpoint's instead.
    Beside another base it comes first: `class Net(AnySize, Other)`.
    """

    _optimizers_at: Size | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the size beside the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = list(current_size(find_model(self)) or ())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the checkpoint's weights, averages too, to the module's size, or the module to theirs."""
        super().on_load_checkpoint(checkpoint)
        size = _size(checkpoint, root := find_model(self))
        if size is None or size == current_size(root):
            return
        trainer = self._trainer
        if trainer is not None and any(isinstance(callback, ResizeCallback) for callback in trainer.callbacks):
            return _resize(trainer, self, size, {})
        averages = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
        for holder in (checkpoint, *averages):
            for key in ("state_dict", "current_model_state", "average_model_state"):
                if holder.get(key):
                    holder[key] = resize_state_dict(holder[key], self, source=size)
        self._optimizers_at = size

    def on_train_start(self) -> None:
        """Bring what the optimizers loaded to the module's size: they are there only now."""
        if self._optimizers_at is not None:
            size = self._optimizers_at
            for one in self.trainer.optimizers:
                one.load_state_dict(resize_optimizer_state_dict(one.state_dict(), one, self, source=size))
            self._optimizers_at = None
        super().on_train_start()


def _size(checkpoint: dict[str, Any], root: nn.Module) -> Size | None:
    """Return the size of a checkpoint's weights: as kept with them, else as their shapes tell."""
    if checkpoint.get(KEY):
        return parse_size(checkpoint[KEY])
    found = source_geometry(by_own_names(checkpoint["state_dict"], root)[1], root)
    return None if found is None else found.get("img_size", current_size(root))


def _resize(trainer: Trainer, module: LightningModule, size: Size, options: ResizeOptions) -> None:
    averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    ema, wrapped = [average for average in averages if average is not None], trainer.strategy.model
    if isinstance(wrapped, DistributedDataParallel):
        resize_ddp(wrapped, size, optimizer=trainer.optimizers, ema=ema, **options)
    else:
        resize_(module, size, optimizer=trainer.optimizers, ema=ema, **options)


def _set_transform(loaders: Any, transform: Callable[..., Any]) -> None:
    """Set the transform of the datasets behind a loader, or several."""
    if isinstance(loaders, (dict, list, tuple)):
        for loader in loaders.values() if isinstance(loaders, dict) else loaders:
            _set_transform(loader, transform)
        return
    dataset: Any = getattr(loaders, "dataset", None)
    while not hasattr(dataset, "transform") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset  # what is inside a Subset
    if not hasattr(dataset, "transform") or getattr(loaders, "persistent_workers", False):
        raise ResizeError(
            f"ResizeCallback: transform= cannot reach the data of {type(loaders).__name__}: it needs a dataset with a "
            "`transform`, and workers that do not persist. Set the size in on_size= instead."
        )
    dataset.transform = transform
