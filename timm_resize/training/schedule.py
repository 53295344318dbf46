"""Progressive resizing: which size each epoch trains at, and what moves along when it changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from typing_extensions import Unpack

from timm_resize.core.copies import meta_copy
from timm_resize.core.find import current_size, find_model
from timm_resize.core.followers import Ema, Optimizers
from timm_resize.core.plan import ResizePlan
from timm_resize.core.request import ResizeOptions
from timm_resize.cost import measure
from timm_resize.errors import InvalidSizeError, ResizeError
from timm_resize.geometry import Size, SizeLike, parse_size, text
from timm_resize.resize import nearest_sizes, resize_

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SizeSchedule:
    """The image size of every epoch.

    Attributes:
        sizes: (H, W) per epoch; later epochs stay at the last.

    Example:
        >>> schedule = SizeSchedule.linear(128, 224, epochs=5)
        >>> [schedule.size(epoch)[0] for epoch in range(6)]
        [128, 152, 176, 200, 224, 224]
    """

    sizes: tuple[Size, ...]

    @classmethod
    def linear(cls, start: SizeLike, end: SizeLike, *, epochs: int, warmup: int = 0, final: int = 1) -> SizeSchedule:
        """Go from `start` to `end` in equal steps.

        Args:
            start: First size, an int or (H, W).
            end: Last size.
            epochs: Epochs in all.
            warmup: Epochs at `end` before the small ones, for weights that were trained there.
            final: Epochs at `end` in the end, at least 1.
        """
        first, last = _size(start, "start"), _size(end, "end")
        steps = _count(epochs, "epochs") - _count(warmup, "warmup", 0) - _count(final, "final") + 1
        if steps < 1:
            raise ResizeError(
                f"SizeSchedule: epochs={epochs} is less than warmup={warmup} and final={final}. Use more epochs."
            )
        ramp = [_between(first, last, i / (steps - 1) if steps > 1 else 1.0) for i in range(steps)]
        return cls((last,) * warmup + tuple(ramp) + (last,) * (final - 1))

    @classmethod
    def steps(cls, sizes: Mapping[int, SizeLike], *, epochs: int) -> SizeSchedule:
        """Change at given epochs: `{0: 128, 10: 176, 20: 224}`."""
        if 0 not in sizes:
            raise ResizeError(
                f"SizeSchedule: sizes={dict(sizes)} says nothing of epoch 0. Give it a size, e.g. {{0: 128}}."
            )
        found = {epoch: _size(size, "sizes") for epoch, size in sizes.items()}
        starts = [max(e for e in found if e <= epoch) for epoch in range(_count(epochs, "epochs"))]
        return cls(tuple(found[start] for start in starts))

    @classmethod
    def cyclic(cls, sizes: Sequence[SizeLike], *, epochs: int, final: int = 1) -> SizeSchedule:
        """Repeat `sizes`, an epoch each; the last `final` epochs are at the last of them."""
        cycle = [_size(size, "sizes") for size in sizes]
        if not cycle:
            raise ResizeError("SizeSchedule: sizes=[] is empty. Give at least one size.")
        run = [cycle[epoch % len(cycle)] for epoch in range(_count(epochs, "epochs") - final)]
        return cls((*run, *(cycle[-1] for _ in range(final))))

    def size(self, epoch: int) -> Size:
        """Return the (H, W) of an epoch, counted from 0."""
        return self.sizes[min(epoch, len(self.sizes) - 1)]

    def snapped(self, model: nn.Module, **options: Unpack[ResizeOptions]) -> SizeSchedule:
        """Return the schedule with every size moved to the nearest that the model allows.

        Raises:
            InvalidSizeError: No valid size is near one of them.
        """
        found: dict[Size, Size] = {}
        name = type(find_model(model)).__name__
        for size in dict.fromkeys(self.sizes):
            near = nearest_sizes(model, size, **options)
            if not near:
                message = f"{name}: img_size={size} has no valid size near it. Use another."
                raise InvalidSizeError(message, model=name, argument="img_size", value=size)
            found[size] = near[0]
        return SizeSchedule(tuple(found[size] for size in self.sizes))

    def batch_sizes(self, base: int, *, model: nn.Module | None = None, multiple: int = 1) -> dict[Size, int]:
        """Return a batch size per size that costs what `base` images of the largest size do.

        Args:
            base: Batch size at the largest size.
            model: Count the scores of its attention as well as its tokens, whichever grows faster, which is what
                fills memory; None counts pixels.
            multiple: Round down to a multiple of this, at least to one multiple.
        """
        load = {size: _load(size, model) for size in dict.fromkeys(self.sizes)}
        largest = max(load.values(), key=lambda values: values[0])
        out = {}
        for size, values in load.items():
            ratio = min(full / part for full, part in zip(largest, values, strict=True) if part)
            out[size] = max(int(base * ratio) // multiple, 1) * multiple
        return out


def _load(size: Size, model: nn.Module | None) -> tuple[int, int]:
    """Return pixels, and the attention scores of a model at that size."""
    if model is None:
        return size[0] * size[1], 0
    there = meta_copy(find_model(model))
    resize_(there, size)
    return size[0] * size[1], sum(measure(there).attention)


def _between(first: Size, last: Size, share: float) -> Size:
    height, width = (round(a + (b - a) * share) for a, b in zip(first, last, strict=True))
    return height, width


def _size(value: SizeLike, name: str) -> Size:
    return parse_size(value, name, "SizeSchedule")


def _count(value: object, name: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ResizeError(f"SizeSchedule: {name}={value!r} is not a number of epochs. Use {least} or more.")
    return value


class ProgressiveResize:
    """Move a model, its optimizers and EMA copies to each epoch's size, and tell whoever makes the images.

    Call `start_epoch` first thing in every epoch. Nothing happens while the size stays.

    Args:
        model: The model that is trained, or something that holds exactly one.
        schedule: Sizes per epoch; snapped to those that the model allows.
        optimizer: One or several, whose state follows the weights.
        ema: One EMA copy or several.
        on_size: Called with (size, batch size) at the first epoch and after each change: set the transform and the
            loader's batch size there. The batch size is None without `batch_size`.
        batch_size: Batch size at the largest size; smaller sizes get larger batches of as many pixels.
        **options: As for `plan_resize`.

    Example:
        >>> import timm, timm_resize, torch
        >>> model = timm.create_model("resnet18")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> sizes = []
        >>> progress = timm_resize.ProgressiveResize(model, timm_resize.SizeSchedule.linear(96, 160, epochs=3),
        ...     optimizer=optimizer, batch_size=32, on_size=lambda size, batch: sizes.append((size, batch)))
        >>> for epoch in range(4):
        ...     plan = progress.start_epoch(epoch)
        >>> sizes
        [((96, 96), 88), ((128, 128), 50), ((160, 160), 32)]
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: SizeSchedule,
        *,
        optimizer: Optimizers | None = None,
        ema: Ema | None = None,
        on_size: Callable[[Size, int | None], object] | None = None,
        batch_size: int | None = None,
        **options: Unpack[ResizeOptions],
    ) -> None:
        """Snap the schedule; nothing is resized yet."""
        self.model = model
        self.schedule = schedule.snapped(model, **options)
        self.optimizer = optimizer
        self.ema = ema
        self.on_size = on_size
        self.batch_sizes = None if batch_size is None else self.schedule.batch_sizes(batch_size)
        self.options = options
        self._announced: Size | None = None

    def start_epoch(self, epoch: int) -> ResizePlan | None:
        """Go to the epoch's size; returns the plan that was applied, None where the size stays."""
        size = self.schedule.size(epoch)
        plan = None
        if current_size(find_model(self.model)) != size:
            plan = resize_(self.model, size, optimizer=self.optimizer, ema=self.ema, **self.options)
            _logger.info("epoch %d: image size %s, %d tensors resized", epoch, text(size), len(plan.tensors))
        if self._announced != size and self.on_size is not None:
            self.on_size(size, self.batch_sizes[size] if self.batch_sizes else None)
        self._announced = size
        return plan
