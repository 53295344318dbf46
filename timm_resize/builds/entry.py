"""One configuration of a class as its builds show it: the builds, what follows the size, and which models it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from timm_resize.builds.rules import Rule
from timm_resize.builds.snapshot import Build, Refused, Snapshot, take
from timm_resize.builds.values import alike
from timm_resize.core.locks import Lock
from timm_resize.core.plan import MISSING, shape_of, submodule
from timm_resize.geometry import Size

RECORD = "resized_img_size"
"""Attribute of a resized model in which nothing else tells its size."""

Shapes = Mapping[str, tuple[int, ...] | None]

AT_HAND = 4
"""Builds that are kept for the next plan."""


@dataclass(eq=False)
class Entry:
    """What one call of `infer` found.

    Attributes:
        build: Makes the model for an image size.
        one_side: Whether it takes one side, and so squares only.
        rules: How each parameter that depends on the size follows it, by name.
        random: Buffers that are random, and so are kept.
        runs: Why a build does not run on images without values, '' where it does.
        tried: Image sizes with the shapes of all that depends on them.
        size_attributes: Attributes that are the image size, as (module path, name), pairs first.
        free: Whether nothing depends on the size.
    """

    build: Build
    one_side: bool
    rules: Mapping[str, Rule] = field(default_factory=dict)
    random: frozenset[str] = frozenset()
    runs: str = ""
    tried: Mapping[Size, Shapes] = field(default_factory=dict)
    size_attributes: Sequence[tuple[str, str]] = ()
    free: bool = False
    _kept: dict[Size, Snapshot] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def at(self, size: Size) -> Snapshot:
        """Return the build at a size.

        Raises:
            Refused: The build does not take it.
        """
        with self._lock:
            found = self._kept.pop(size, None) or take(self.build, size, one_side=self.one_side)
            self._kept[size] = found
            for oldest in list(self._kept)[:-AT_HAND]:
                del self._kept[oldest]
        return found

    def size_of(self, model: nn.Module) -> Size | None:
        """Return a model's image size, as recorded, as its attributes say, or as its shapes do; None if unknown."""
        recorded = as_size(model.__dict__.get(RECORD))
        if recorded is not None:
            return recorded
        for path, name in self.size_attributes:
            owner = submodule(model, path)
            size = as_size(None if owner is None else owner.__dict__.get(name))
            if size is not None:
                return size
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **_buffers(model)}
        fitting = [
            size
            for size, shapes in self.tried.items()
            if shapes and all(shape_of(tensors.get(name)) == shape for name, shape in shapes.items())
        ]
        return fitting[0] if len(fitting) == 1 else None

    def fits(self, model: nn.Module, size: Size) -> bool:
        """Whether a model of that image size is of this configuration."""
        try:
            return not self.misfit(model, self.at(size))
        except Refused:
            return False

    def misfit(self, model: nn.Module, built: Snapshot) -> str:
        """Say why a model is not of this configuration at a size, '' where it is.

        Another number of outputs of a linear layer, such as a classifier, is none of the size's business.
        """
        if type(model) is not type(built.model):  # a subclass may compute something else
            return f"it is a {type(model).__name__}, and a {type(built.model).__name__} in the build"
        have = {name: shape_of(p) for name, p in model.named_parameters(remove_duplicate=False)}
        missing = {name for name, shape in built.shapes.items() if shape is not None} ^ have.keys()
        if missing:
            name = min(missing)
            return f"{name} is {'not there' if name not in have else 'not in the build'}"
        for name, shape in have.items():
            want = built.shapes[name] or ()
            owner = submodule(model, name.rpartition(".")[0])
            outputs = (
                isinstance(owner, nn.Linear) and name not in self.rules and shape is not None and shape[1:] == want[1:]
            )
            if shape != want and not outputs:
                return f"{name} is {shape}, and {want} in the build"
        buffers = _buffers(model)
        for name, buffer in built.buffers.items():
            if name not in buffers or shape_of(buffers[name]) != shape_of(buffer):
                return f"the buffer {name} is {shape_of(buffers.get(name))}, and {shape_of(buffer)} in the build"
        return ""


def as_size(value: object) -> Size | None:
    """Return a value as an image size (H, W): a pair, or one side of a square; None for anything else."""
    sides = (value, value) if isinstance(value, int) else value
    if isinstance(sides, (tuple, list)) and len(sides) == 2 and all(type(side) is int for side in sides):
        return sides[0], sides[1]
    return None


def _buffers(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        f"{path}.{name}".removeprefix("."): tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in module._buffers.items()
    }


def is_as_built(tensor: Tensor | None, built: Tensor | None) -> bool:
    """Whether a model's buffer has the values of its build, as far as its type and device let it; None has its own."""
    if tensor is None or built is None or tensor.is_meta:
        return True
    want = built.to(tensor.dtype)
    have = tensor.detach().to("cpu")
    if not tensor.dtype.is_floating_point:
        return torch.equal(have, want)
    return torch.allclose(have.double(), want.double(), rtol=1e-2, atol=1e-4, equal_nan=True)


def is_held(module: nn.Module, name: str, built: object) -> bool:
    """Whether a module has an attribute as a build has it."""
    return alike(module.__dict__.get(name, MISSING), built)
