"""Everything that a model holds, and whether two values, tensors or outputs are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tests.helpers.oracle import plain

VOLATILE = {"attention_bias_cache", "cache_of", "_parameters", "_buffers", "_modules", "training"}
"""What a forward fills, and what is compared on its own."""


class WrongError(AssertionError):
    """A success that is not one, or an error that left something changed."""


def snapshot(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return every tensor with its identity and values, every child and every attribute, by place."""
    out: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        out[path, "class"] = type(module)
        for name, value in module.__dict__.items():
            if name not in VOLATILE:
                out[path, name] = plain(value)
        out |= {(path, f"child {n}"): id(m) for n, m in module._modules.items()}
        for kind in ("_parameters", "_buffers"):
            for name, tensor in module.__dict__[kind].items():
                out[path, f"{kind} {name}"] = None if tensor is None else (id(tensor), tensor.detach().clone())
    return out


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        return alike and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def output_tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for item in (output.values() if isinstance(output, dict) else output) for t in output_tensors(item)]


@contextmanager
def unchanged(model: nn.Module, always: bool = False) -> Iterator[None]:
    """See that a block that raises, or any, leaves a model as it was.

    Raises:
        WrongError: It does not.
    """
    before = snapshot(model)
    try:
        yield
    except Exception:
        always = True
        raise
    finally:
        now = snapshot(model) if always else before
        for key in {**before, **now}:
            if key not in before or key not in now or not same(before[key], now[key]):
                raise WrongError(f"changed: {key}")


def assert_near(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], tolerance: float) -> None:
    """Raise WrongError unless each first tensor is the second, but for so much of its largest value."""
    for name, (got, want) in pairs.items():
        if got.shape != want.shape:
            raise WrongError(f"{name} is {tuple(got.shape)}, not {tuple(want.shape)}")
        if got.numel():
            error = float((got.double() - want.double()).abs().max()) / (float(want.double().abs().max()) + 1e-6)
            if not error <= tolerance:
                raise WrongError(f"{name} differs by {error:.2g} of its largest value")
