"""Models wrapped for training on several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import Unpack

from timm_resize.core.followers import Ema, Optimizers
from timm_resize.core.request import ResizeOptions
from timm_resize.errors import ResizeError, UnsupportedModelError
from timm_resize.geometry import SizeLike
from timm_resize.resize import resize_


def resize_ddp(
    model: nn.Module,
    img_size: SizeLike,
    *,
    optimizer: Optimizers | None = None,
    ema: Ema | None = None,
    **options: Unpack[ResizeOptions],
) -> DistributedDataParallel:
    """Resize the model inside a DistributedDataParallel, whose gradient buckets are made anew.

    Call it on every rank, between steps. Parameters and wrapper are the same objects, so whatever else holds them goes
    on: an optimizer, `accelerate`'s own lists. Every setting of the wrapper stays, its communication hooks among them,
    with what they keep.

    Args:
        model: The wrapper.
        img_size: An int or (H, W) in pixels.
        optimizer: One optimizer or several, whose state follows the weights.
        ema: One EMA copy or several.
        **options: As for `plan_resize`.

    Returns:
        The wrapper.

    Raises:
        UnsupportedModelError: Not a DistributedDataParallel, or one that keeps copies of old shapes.
        InvalidSizeError: The size cannot work; nothing has changed.
    """
    if not isinstance(model, DistributedDataParallel):
        raise UnsupportedModelError(
            f"{type(model).__name__}: not a DistributedDataParallel. Use timm_resize.resize_ for a plain model, "
            "timm_resize.resize_fsdp for one that fully_shard sharded."
        )
    _refuse_copies(model)
    resize_(model.module, img_size, optimizer=optimizer, ema=ema, **options)
    model.__setstate__(dict(model.__dict__))  # as unpickling does: the same settings, another reducer
    model._has_rebuilt_buckets = model._static_graph_delay_allreduce_enqueued = False  # it has seen no step yet
    for hook, state in model._comm_hooks:
        dist._register_comm_hook(model.reducer, state, hook)
    return model


def _refuse_copies(model: DistributedDataParallel) -> None:
    """Raise UnsupportedModelError for settings whose tensors, or whose very choice, the wrapper does not give away."""
    hook = model._get_ddp_logging_data().get("comm_hook")
    reasons = {
        "mixed_precision=": "keeps a copy of each parameter" if model.mixed_precision is not None else "",
        "delay_all_reduce_named_params=": "keeps a buffer of gradients" if model._delay_all_reduce_params else "",
        f"the built-in hook {hook}": "cannot be asked for again" if hook and not model._comm_hooks else "",
    }
    for what, why in reasons.items():
        if why:
            raise UnsupportedModelError(
                f"DistributedDataParallel: {what} {why}. Resize model.module and wrap it again as it was.",
                model="DistributedDataParallel",
            )


def resize_fsdp(
    model: nn.Module,
    img_size: SizeLike,
    *,
    build: Callable[[], nn.Module],
    shard: Callable[[nn.Module], object],
    optimizer: Optimizer | None = None,
    build_optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
    **options: Unpack[ResizeOptions],
) -> tuple[nn.Module, Optimizer | None]:
    """Resize a model that `torch.distributed.fsdp.fully_shard` sharded: gather, resize on every rank, shard anew.

    Sharded parameters keep the shapes that they were sharded with, so there is no way in place. Call it on every rank,
    between steps, where the whole model and its optimizer state fit into each rank's memory once.

    Args:
        model: The sharded model. Unchanged; drop it afterwards.
        img_size: An int or (H, W) in pixels.
        build: Makes the plain model at the sharded one's size, with any weights.
        shard: Applies `fully_shard` as it was applied before; changes the model it is given.
        optimizer: The optimizer over the sharded parameters.
        build_optimizer: Makes a new one from parameters; needed with `optimizer`.
        **options: As for `plan_resize`.

    Returns:
        The new sharded model, and the new optimizer or None.

    Raises:
        UnsupportedModelError: Not sharded.
        ResizeError: `optimizer` without `build_optimizer`.
        InvalidSizeError: The size cannot work; nothing has changed.
    """
    if not is_sharded(model):
        raise UnsupportedModelError(f"{type(model).__name__}: not sharded. Use timm_resize.resize_ for a plain model.")
    if optimizer is not None and build_optimizer is None:
        raise ResizeError(f"{type(model).__name__}: optimizer= goes with build_optimizer=, which makes its successor.")
    from torch.distributed.checkpoint.state_dict import (  # imports half of torch.distributed
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    whole = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(model, options=whole)
    plain = build()
    plain.load_state_dict(weights)
    if optimizer is None or build_optimizer is None:
        resize_(plain, img_size, **options)
        shard(plain)
        return plain, None
    state = get_optimizer_state_dict(model, optimizer, options=whole)
    follower = build_optimizer(plain.parameters())
    set_optimizer_state_dict(plain, follower, state, options=whole)
    resize_(plain, img_size, optimizer=follower, **options)
    state = get_optimizer_state_dict(plain, follower, options=whole)
    shard(plain)
    successor = build_optimizer(plain.parameters())
    set_optimizer_state_dict(plain, successor, state, options=whole)
    return plain, successor


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a model, which gives it a class of its own."""
    return any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__)
