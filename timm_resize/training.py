"""What follows a model's weights through a resize while it trains: optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from timm_resize.resample import Resample


def optimizer_writes(optimizer: Any, maps: dict[nn.Parameter, Resample]) -> list[Callable[[Any], None]]:
    """Compute an optimizer's state for resampled parameters; return the writes.

    State of the parameter's shape goes through the parameter's own map, or, where it has no negative entry
    (second moments), through `Resample.second_moment`, which keeps it non-negative. Empty state is fine.

    Args:
        optimizer: A `torch.optim.Optimizer`, or anything with a `state` mapping per parameter.
        maps: The map of each resampled parameter, before the parameters are written.
    """
    writes: list[Callable[[Any], None]] = []
    for param, how in maps.items():
        state = optimizer.state.get(param)
        for name, value in (state or {}).items():
            if not isinstance(value, Tensor) or value.shape != param.shape:
                continue
            signed = value.is_meta or bool((value < 0).any())
            new = how(value) if signed else how.second_moment(value)
            writes.append(lambda t, s=state, n=name, v=new: t.item(s, n, v))  # type: ignore[misc]
    return writes
