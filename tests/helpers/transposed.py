"""The same model with height and width exchanged: what it makes of a transposed image is the transposed result."""

from __future__ import annotations

import copy

import torch
from torch import nn


def transposed(model: nn.Module, swap: dict[str, str] | None = None) -> nn.Module:
    """Copy `model` with every convolution's kernel transposed and the parameters named in `swap` exchanged.

    `swap` maps the ends of parameter names, e.g. {"rel_pos_h": "rel_pos_w"}.
    """
    turned = copy.deepcopy(model)
    with torch.no_grad():
        for module in turned.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.transpose(-1, -2).clone())
        named = dict(turned.named_parameters())
        for name, param in named.items():
            for end, other in (swap or {}).items():
                if name.endswith(end):
                    param.data, named[name.removesuffix(end) + other].data = (
                        named[name.removesuffix(end) + other].data,
                        param.data,
                    )
    return turned
