"""Layers and wrappers as other people write them, each around, or in the place of, one of timm's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Lora(nn.Module):
    """An adapter around a linear layer."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(0.3 * torch.randn(rank, base.in_features))
        self.b = nn.Parameter(0.3 * torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class OpenLora(Lora):
    """One that answers for its layer."""

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class LoraLinear(nn.Linear):
    """One that is a linear layer, as in loralib."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.load_state_dict(base.state_dict())
        like = Lora(base)
        self.a, self.b = like.a, like.b

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


class Transposed(nn.Linear):
    """A linear layer whose weight is (inputs, outputs)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.weight, self.bias = nn.Parameter(base.weight.T.clone()), base.bias

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight
        return out if self.bias is None else out + self.bias


class Grouped(nn.Linear):
    """A linear layer whose outputs have a scale of their own, as magnitudes apart from directions."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.magnitude = nn.Parameter(torch.full((base.out_features, 1), 2.0))
        self.weight.data /= 2

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.magnitude, self.bias)


class Same(nn.Linear):
    """A linear layer under another name."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.load_state_dict(base.state_dict())


class Scaled(nn.Module):
    """Something around a block."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.tensor(0.9))

    def forward(self, *args: object, **kwargs: object) -> object:
        out = self.inner(*args, **kwargs)
        return out * self.scale if isinstance(out, Tensor) else out


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2


class Lit(nn.Module):
    """A training program's module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.temperature = net, nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> object:
        return self.net(x)


class Parallel(nn.Module):
    """As DistributedDataParallel names its model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> object:
        return self.module(x)
