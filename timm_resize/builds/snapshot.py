"""One build of a model at one size, kept without its weights, and what differs between two."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from timm_resize.builds.values import alike
from timm_resize.core.copies import HOLDERS, meta_copy, planning_copy
from timm_resize.core.find import find_model
from timm_resize.core.plan import MISSING, shape_of
from timm_resize.geometry import Size
from timm_resize.weights import fast_init

Build = Callable[..., nn.Module]
"""Takes an image size, as (H, W) or as one side, and returns a model."""

KEPT = {"_traits", "_model_args", "pretrained_cfg", "default_cfg", "training"}
"""Attributes that the planner keeps itself, or that tell of something else than the size."""


class Refused(Exception):  # noqa: N818  (a signal inside this room)
    """Raised where a build does not take a size."""


@dataclass(frozen=True)
class Run:
    """What came of running a build on an image without values.

    Attributes:
        failed: Why it failed, '' where it did not.
        refilled: Buffers that forward replaced by ones of another shape.
    """

    failed: str
    refilled: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a build at one size has.

    Attributes:
        size: The image size (H, W).
        model: The model with its tensors on the meta device.
        shapes: Shape of every parameter, None for one that is not there, by name.
        buffers: Every buffer, with its values, by name.
        attributes: Attributes of every module, by its path.
    """

    size: Size
    model: nn.Module
    shapes: dict[str, tuple[int, ...] | None]
    buffers: dict[str, Tensor | None]
    attributes: dict[str, dict[str, object]] = field(repr=False)

    @functools.cached_property
    def ran(self) -> Run:
        """What comes of running it on images of its size without values."""
        return run(self)


def take(build: Build, size: Size, *, one_side: bool = False, seed: int = 0) -> Snapshot:
    """Build at a size, drawing no weights, and leave every random state as it was.

    Raises:
        Refused: `build` fails there, or returns no module.
    """
    with _random_states_kept(seed), fast_init.dropped() as compute:
        try:
            model = build(size[0] if one_side else size)
        except Exception as error:  # code of anybody
            lines = str(error).splitlines() or [""]
            raise Refused(f"{type(error).__name__}: {lines[0]}") from error
        if not isinstance(model, nn.Module):
            raise Refused(f"it returns a {type(model).__name__}, not a torch.nn.Module")
        model = find_model(model) if hasattr(model, "pretrained_cfg") else model
        buffers = dict(_named(model, "_buffers"))
        for tensor in buffers.values():
            if tensor is not None:
                compute(tensor)
        buffers = {name: None if b is None else b.detach().clone() for name, b in buffers.items()}
        attributes = {path: _attributes(module, compute) for path, module in _modules(model)}
    shapes = {name: shape_of(parameter) for name, parameter in _named(model, "_parameters")}
    return Snapshot(size, planning_copy(model), shapes, buffers, attributes)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return iter(model.named_modules(remove_duplicate=False))


def _named(model: nn.Module, holder: str) -> Iterator[tuple[str, Tensor | None]]:
    for path, module in _modules(model):
        for name, tensor in module.__dict__[holder].items():
            yield f"{path}.{name}".removeprefix("."), tensor


def _attributes(module: nn.Module, compute: Callable[[Tensor], None]) -> dict[str, object]:
    """Return the attributes that a module's class and its constructor gave it, without torch's own."""
    out = {}
    for name, value in module.__dict__.items():
        if name not in KEPT and name not in HOLDERS and name not in _TORCHS:
            if isinstance(value, Tensor):
                compute(value)
            out[name] = value
    return out


_TORCHS = frozenset(nn.Module().__dict__)


@contextmanager
def _random_states_kept(seed: int) -> Iterator[None]:
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)


def structure(a: Snapshot, b: Snapshot) -> str:
    """Say which module or tensor only one of two builds has, or has as another class; '' where they agree."""
    first, second = (dict(_parts(snapshot)) for snapshot in (a, b))
    for name in (*first, *second):
        if first.get(name) != second.get(name):
            return f"the {name} is not the same at {a.size} and at {b.size}"
    for name, shape in a.shapes.items():
        if len(shape or ()) != len(b.shapes[name] or ()):
            return f"the parameter {name} has another number of dimensions at {a.size} than at {b.size}"
    return ""


def _parts(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """Yield everything that all builds have to have, and what it is."""
    for path, module in _modules(snapshot.model):
        yield f"module {path or 'itself'}", type(module).__qualname__
    for name, shape in snapshot.shapes.items():
        yield f"parameter {name}", "None" if shape is None else "there"
    for name in snapshot.buffers:
        yield f"buffer {name}", "there"


def changed_buffers(a: Snapshot, b: Snapshot) -> list[str]:
    """Return the buffers whose shape or value is not the same in two builds."""
    return [name for name in a.buffers if not alike(a.buffers[name], b.buffers[name])]


def changed_attributes(a: Snapshot, b: Snapshot) -> list[tuple[str, str]]:
    """Return the attributes, by module path and name, that are not the same in two builds."""
    return [
        (path, name)
        for path, held in a.attributes.items()
        for name in dict.fromkeys((*held, *b.attributes[path]))
        if not alike(held.get(name, MISSING), b.attributes[path].get(name, MISSING))
    ]


def run(snapshot: Snapshot, size: Size | None = None) -> Run:
    """Run a build on images without values, of its own size or of another."""
    model = meta_copy(snapshot.model).eval()
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, Tensor):
                module.__dict__[name] = torch.empty_like(value, device="meta")
    convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))
    channels = getattr(model, "in_chans", None) or next(convolutions, 3)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        with torch.no_grad():
            model(torch.empty(2, channels, *(size or snapshot.size), device="meta", dtype=dtype))
    except Exception as error:  # code of anybody
        return Run(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    after = {name: shape_of(tensor) for name, tensor in _named(model, "_buffers")}
    return Run("", tuple(name for name, b in snapshot.buffers.items() if after.get(name) != shape_of(b)))
