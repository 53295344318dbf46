"""Models wrapped for training on several processes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_resize.apply import resize_
from timm_resize.errors import UnsupportedModelError


def resize_ddp(model: nn.Module, img_size: Any, **options: Any) -> DistributedDataParallel:
    """Resize the model inside a DistributedDataParallel, and wrap it again as it was wrapped.

    Call it on every rank, between steps. The Parameters are the same objects; the wrapper, whose gradient buckets are
    of the old shapes, is a new one: use what is returned from then on.

    Args:
        model: The wrapper.
        img_size: An int or (H, W) in pixels.
        **options: As for `resize_`: `optimizer`, `ema`, `window_size` ….

    Returns:
        A new wrapper around the same module.

    Raises:
        UnsupportedModelError: Not a DistributedDataParallel.
        InvalidSizeError: The size cannot work; nothing has changed, and the old wrapper goes on working.
    """
    if not isinstance(model, DistributedDataParallel):
        raise UnsupportedModelError(
            f"{type(model).__name__}: not a DistributedDataParallel. Use timm_resize.resize_ for a plain model, and "
            "resize before fully_shard: DTensors keep the shapes that they were sharded with."
        )
    module = model.module
    resize_(module, img_size, **options)
    return DistributedDataParallel(
        module,
        device_ids=model.device_ids,
        output_device=model.output_device,
        dim=model.dim,
        broadcast_buffers=model.broadcast_buffers,
        process_group=model.process_group,
        find_unused_parameters=model.find_unused_parameters,
        gradient_as_bucket_view=model.gradient_as_bucket_view,
        static_graph=model.static_graph,
    )
