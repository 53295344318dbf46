"""What is computed from weights and kept, and whether the weights are still as they were then.

On the CPU values are compared, so that every write counts. Elsewhere a comparison would wait for the device: there
torch's own count of writes decides, which an in-place write through `.data` escapes.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Tuple  # noqa: UP035  (torch.jit.script reads the hook's annotations as written)

import torch
from torch import Tensor, nn

CACHE_OF = "cache_of"
"""Attribute of a module that keeps such a thing in eval: the name of its cache, and its weights as they were."""

HOOK = "timm_resize.caches"
"""Key of the hook among the module's forward pre-hooks."""


class Seen:
    """A tensor as it was when something was computed from it."""

    def __init__(self, tensor: Tensor) -> None:
        """Remember the tensor: its value on the CPU, elsewhere its memory and how often it was written to."""
        self.value = tensor.detach().clone() if _comparable(tensor) else None
        self.memory = tensor.detach()  # held, so that no later tensor gets its place
        self.version = _version(tensor)

    def still(self, tensor: Tensor) -> bool:
        """Whether `tensor` is as the other was."""
        was = self.memory
        if (was.dtype, was.device, was.shape) != (tensor.dtype, tensor.device, tensor.shape):
            return False
        if self.value is not None and _comparable(tensor):
            return torch.equal(self.value, tensor)
        return tensor.is_meta or (self.version == _version(tensor) and was.data_ptr() == tensor.data_ptr())


def _comparable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)  # no fake one, of a trace


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode, where nothing is counted
        return 0


def follow_weights(self, args: Tuple[torch.Tensor]) -> None:  # noqa: UP006
    """Empty what a module keeps of its weights in eval, where it would be wrong: LeViT-like attention does in stock.

    That is once they have changed, and while gradients are recorded or a graph is made, which it would be outside of.
    """
    if not torch.jit.is_scripting():  # the compiler of scripts drops the branch
        _empty_if_stale(self)


def _empty_if_stale(module: nn.Module) -> None:
    name, seen = module.__dict__[CACHE_OF]
    if torch.compiler.is_compiling():
        changed = True
    else:
        weights = [p for p in module._parameters.values() if p is not None]
        changed = len(seen) != len(weights) or not all(s.still(p) for s, p in zip(seen, weights, strict=True))
        if changed:
            module.__dict__[CACHE_OF] = name, [Seen(p) for p in weights]
    if module.__dict__[name] and (changed or torch.is_grad_enabled()):
        module.__dict__[name] = {}
