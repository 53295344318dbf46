"""The names of a checkpoint's tensors, without what wrappers put before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def without_wrappers(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state dict without the prefixes of modules that wrapped the model, as its own names are known.

    Of `DistributedDataParallel` and the EMA copies (`module.`), `torch.compile` (`_orig_mod.`) and programs that keep
    the model as `model.`; the averaged model's counter goes with its prefix.
    """
    probe = next(iter(own), "")
    for key in state_dict:
        prefix = key[: -len(probe)] if probe and key.endswith(probe) else ""
        if prefix and not (set(prefix.rstrip(".").split(".")) - {"module", "_orig_mod", "model"}):
            return {k.removeprefix(prefix): v for k, v in state_dict.items() if k != "n_averaged"}
    return state_dict


def without_geometry(state_dict: Mapping[str, Any], root: nn.Module) -> dict[str, Any]:
    """Return a state dict without what other programs save and the model computes from its geometry.

    Masks, indices, coordinate tables and caches of rotary embeddings: names of buffers that the model has, but that
    are not in its own state dict.
    """
    own = root.state_dict()
    buffers = {f"{path}.{n}" if path else n for path, module in root.named_modules() for n in module._buffers}
    return {k: v for k, v in state_dict.items() if k in own or k not in buffers}
