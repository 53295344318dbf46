"""Stock timm as the oracle: comparing models tensor by tensor and attribute by attribute."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
from torch import nn

import timm_resize

SKIPPED = {
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_resize_chain",
    "_resize_history",
    "pretrained_cfg",
    "default_cfg",
    "pretrained_model_args",
    "_model_args",
    "_traits",
    "attention_bias_cache",
    "cache_of",
    "input_guard",
}
"""Module internals compared on their own, our record of originals, source descriptions, caches, our guard."""


def stock(name: str, **kwargs: Any) -> nn.Module:
    """Build with stock timm, in evaluation mode."""
    assert not hasattr(timm.create_model, "__wrapped__"), "the plugin is installed"
    return timm.create_model(name, **kwargs).eval()


def redraw_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw every parameter so that nothing is near zero or constant; matrices keep a scale that trains.

    Tables, embeddings and biases of a size get std 1, the rest a std that keeps activations finite.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = any(n in name for n in ("pos_embed", "bias_table", "attention_biases", "patch_pos", "rel_pos"))
            fan_in = p[0].numel() if p.dim() > 1 else 1
            std = 1.0 if wide else (fan_in**-0.5 if p.dim() > 1 else 0.1)
            drawn = torch.randn(p.shape, generator=generator) * std
            p.copy_(drawn if wide or p.dim() > 1 or not name.endswith("weight") else drawn + 1.0)
    return model


def sizes_for(model: nn.Module) -> list[tuple[int, int]]:
    """Return a larger, a smaller and two non-square valid sizes for a model (unequal, H>W and W>H)."""
    native = timm_resize.plan_resize(model).new_size[0]
    large = nearest_valid(model, (native * 3 // 2,) * 2)
    small = nearest_valid(model, (native * 2 // 3,) * 2)
    return [large, small, nearest_valid(model, (large[0], native)), nearest_valid(model, (native, large[0]))]


def nearest_valid(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    found = timm_resize.nearest_sizes(model, size)
    assert found, f"no valid size near {size}"
    return found[0]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and all buffers, persistent or not, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return every plain Python attribute of every submodule."""
    return {
        (path, name): plain(value)
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if name not in SKIPPED and not name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
    }


def plain(value: Any) -> Any:
    """Reduce a value to something that compares by content and type."""
    if isinstance(value, functools.partial):
        return ("partial", plain(value.func), plain(value.args), plain(value.keywords))
    if isinstance(value, dict):
        return (type(value).__name__, {k: plain(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [plain(v) for v in value])
    if isinstance(value, torch.Tensor):
        return ("tensor", value.tolist())
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return (type(value).__name__, value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def assert_same_structure(got: nn.Module, want: nn.Module, ignore: frozenset[str] | set[str] = frozenset()) -> None:
    """Parameter shapes, buffers bit for bit, and all attributes but those of names in `ignore` agree."""
    assert {n: tuple(p.shape) for n, p in got.named_parameters()} == {
        n: tuple(p.shape) for n, p in want.named_parameters()
    }
    a, b = dict(got.named_buffers()), dict(want.named_buffers())
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), f"buffer {name} differs"
    assert got.state_dict().keys() == want.state_dict().keys()
    have, wanted = attributes(got), attributes(want)
    wrong = {k: (have.get(k), v) for k, v in wanted.items() if have.get(k) != v and k[1] not in ignore}
    assert not wrong, f"attributes (ours, stock): {wrong}"
    assert have.keys() == wanted.keys()


def assert_close(got: nn.Module, want: nn.Module, tolerance: float = 1e-5) -> None:
    """All tensors agree to `tolerance` absolute."""
    a, b = tensors(got), tensors(want)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape, name
        error = (a[name].double() - b[name].double()).abs().max().item() if a[name].numel() else 0.0
        assert error <= tolerance, f"{name} differs by {error}"


def image(size: tuple[int, int], batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Return a seeded random batch (batch, 3, H, W)."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def first(output: Any) -> torch.Tensor:
    """Return the first tensor of an output."""
    return output if isinstance(output, torch.Tensor) else first(output[0])
