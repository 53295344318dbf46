"""Batch-norm statistics estimated anew, as the images of another size have other ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from timm_resize.errors import ResizeError
from timm_resize.geometry import Size
from timm_resize.multi_size import MultiSize


@dataclass
class _Sums:
    """Of all values that a norm has seen, by channel: how many, their sum, and the sum of their squares (float64)."""

    count: Tensor
    total: Tensor
    squares: Tensor

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def mean_and_var(self) -> tuple[Tensor, Tensor]:
        """Return the mean, and the variance as batch norm keeps it: over the count less one."""
        mean = self.total / self.count
        return mean, (self.squares - self.count * mean**2).clamp(min=0) / (self.count - 1)


@dataclass
class _Size:
    """What was seen at one size: the sums by norm, in the order of `modules`, and how many images."""

    norms: dict[str, _Sums] = field(default_factory=dict)
    images: int = 0


def recalibrate_(
    model: nn.Module, loader: Iterable[object], *, steps: int | None = None, progress: bool = False
) -> int:
    """Estimate the running mean and variance of every batch norm from images, without labels or gradients.

    They become the mean and variance over all values that a norm sees in these batches, each batch normalised by its
    own statistics, as in training, while dropout is off. Only these two buffers of each norm change; momentum, modes
    and `num_batches_tracked` are as before, and after an error everything is.

    A `MultiSize` gets statistics for each size that the loader gives; its model keeps its own. In a
    `DistributedDataParallel` the values of all ranks count, so every rank must call it.

    Args:
        model: The model, or something that holds it and takes a batch of images.
        loader: Gives batches: (batch, channels, height, width), or a tuple, list or dict with one. Floating point,
            normalised as for training. They are moved to the model's device and dtype.
        steps: Batches to take; None for all.
        progress: Show a bar.

    Returns:
        How many images were used.

    Raises:
        ResizeError: No batch norm with running statistics, a loader that gives nothing, a batch without images, or a
            norm that sees a single value in a batch.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3.

    Example:
        >>> import timm, timm_resize, torch
        >>> model = timm_resize.create_model("resnet18", img_size=96).eval()
        >>> timm_resize.recalibrate_(model, [torch.randn(4, 3, 96, 96) for _ in range(2)])
        8
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    name = type(inner.model if isinstance(inner, MultiSize) else inner).__name__
    if steps is not None and steps < 1:
        raise ResizeError(f"{name}: steps={steps} takes no batch. Use 1 or more, or None for all of the loader.")
    if not _norms(inner):
        raise ResizeError(f"{name}: there is no batch norm with running statistics in it, so there is nothing to do.")
    seen: dict[Size | None, _Size] = {}
    for batch in _bar(itertools.islice(loader, steps), steps, progress):
        _see(inner, _images(batch, inner, name), seen)
    if isinstance(model, DistributedDataParallel):
        _add_up(seen, model)
    if not seen:
        raise ResizeError(f"{name}: the loader gave no batch. Give at least a few hundred images.")
    _write(inner, seen)
    return sum(of_size.images for of_size in seen.values())


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    found = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {path: norm for path, norm in found.items() if norm.track_running_stats and norm.running_mean is not None}


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _see(inner: nn.Module, images: Tensor, seen: dict[Size | None, _Size]) -> None:
    """Run a batch, and add what the norms see of it to the sums of its size."""
    size, run = None, inner
    if isinstance(inner, MultiSize):
        size = int(images.shape[-2]), int(images.shape[-1])
    with _evaluating(inner), torch.no_grad():
        if isinstance(inner, MultiSize):
            run = inner._at(images.shape)
        batch = _Size(dict(seen[size].norms) if size in seen else {})
        with _watching(run, batch.norms):
            run(images)
    batch.images = len(images) + (seen[size].images if size in seen else 0)
    seen[size] = batch


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _watching(model: nn.Module, sums: dict[str, _Sums]) -> Iterator[None]:
    """Let every batch norm normalise by the batch, and add what it sees to `sums`; its buffers are put back."""
    norms = _norms(model)
    momenta = {path: norm.momentum for path, norm in norms.items()}
    buffers = [(b, b.clone()) for norm in norms.values() for b in norm._buffers.values() if b is not None]
    hooks = []

    def added(path: str, norm: _BatchNorm, x: Tensor) -> None:
        count = torch.tensor(x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        mean, var = (buffer.double() for buffer in _running(norm))
        new = _Sums(count, count * mean, (count - 1) * var + count * mean**2)
        sums[path] = sums[path] + new if path in sums else new

    for path, norm in norms.items():
        norm.training, norm.momentum = True, 1.0  # what it keeps is then the last batch's
        hooks.append(norm.register_forward_hook(lambda norm, args, _, path=path: added(path, norm, args[0])))
    try:
        yield
    except ValueError as error:  # torch's, for a norm that sees one value
        raise ResizeError(f"{type(model).__name__}: {error} Use larger batches.") from error
    finally:
        for hook in hooks:
            hook.remove()
        for path, norm in norms.items():
            norm.training, norm.momentum = False, momenta[path]
        for buffer, before in buffers:
            buffer.copy_(before)


def _add_up(seen: dict[Size | None, _Size], model: DistributedDataParallel) -> None:
    """Make `seen` that of all ranks together."""
    ranks: list[dict[Size | None, _Size] | None] = [None] * torch.distributed.get_world_size(model.process_group)
    torch.distributed.all_gather_object(ranks, seen, model.process_group)
    seen.clear()
    device = next(model.parameters()).device
    for rank in ranks:
        for size, more in (rank or {}).items():
            mine = seen.setdefault(size, _Size())
            mine.images += more.images
            for path, new in more.norms.items():
                here = _Sums(new.count.to(device), new.total.to(device), new.squares.to(device))
                mine.norms[path] = mine.norms[path] + here if path in mine.norms else here


def _write(inner: nn.Module, seen: dict[Size | None, _Size]) -> None:
    for size, of_size in seen.items():
        values = {path: sums.mean_and_var() for path, sums in of_size.norms.items()}
        if isinstance(inner, MultiSize):
            assert size is not None
            inner.set_statistics(size, values)
            continue
        norms = _norms(inner)
        with torch.no_grad():
            for path, pair in values.items():
                for buffer, value in zip(_running(norms[path]), pair, strict=True):
                    buffer.copy_(value)


def _images(batch: object, model: nn.Module, name: str) -> Tensor:
    """Return the images of a batch, as the model takes them."""
    held = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
    images = next((t for t in held if isinstance(t, Tensor) and t.dim() == 4), None)
    if images is None or not images.is_floating_point():
        found = f"a {images.dtype} tensor" if images is not None else f"a {type(batch).__name__} without one"
        raise ResizeError(
            f"{name}: the loader gave {found}. A batch needs normalised images: floating point, (batch, channels, "
            "height, width)."
        )
    like = next(p for p in model.parameters() if p.is_floating_point())
    return images.to(like.device, like.dtype, non_blocking=True)


def _bar(batches: Iterable[object], steps: int | None, progress: bool) -> Iterable[object]:
    if not progress:
        return batches
    from tqdm.auto import tqdm  # comes with huggingface_hub

    return tqdm(batches, total=steps, unit="batch")
