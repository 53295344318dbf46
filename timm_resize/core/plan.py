"""What a resize would do, as values: changes, the plan that lists them, and checks against a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from timm_resize.errors import StalePlanError
from timm_resize.geometry import Size, text
from timm_resize.resample import Resample

Kind = Literal["parameter", "buffer", "attribute"]


@dataclass(frozen=True)
class Rebuild:
    """A buffer computed from geometry alone.

    Attributes:
        fn: Called as `fn(*args, device=..., dtype=...)`.
        args: Hashable arguments.
        like: Name of the tensor of the module whose device and dtype the buffer takes; '' for the buffer itself.
    """

    fn: Callable[..., Tensor]
    args: tuple[Any, ...] = ()
    like: str = ""
    label: str = "rebuilt"


@dataclass(frozen=True)
class Reinitialise:
    """A buffer that the module's own `init_non_persistent_buffers` fills, once its attributes are set."""

    label: str = "rebuilt"


@dataclass(frozen=True)
class Change:
    """One thing a resize changes.

    Attributes:
        path: Module path in the model, '' for the model itself.
        name: Name of the parameter, buffer or attribute in that module.
        kind: What it is.
        old: Its value for an attribute; its shape for a tensor, None when absent.
        new: Likewise, afterwards.
        how: The map for a parameter, the rule for a buffer, None for an attribute.
    """

    path: str
    name: str
    kind: Kind
    old: Any
    new: Any
    how: Resample | Rebuild | Reinitialise | None = None

    @property
    def key(self) -> str:
        """Dotted name, as in a state dict."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def action(self) -> str:
        """What happens, for tables: 'resampled: bicubic antialias', 'rebuilt', 'set' …."""
        if self.how is None:
            return "set" if self.kind == "attribute" else "dropped"
        return f"resampled: {self.how.label}" if isinstance(self.how, Resample) else self.how.label


@dataclass(frozen=True)
class ResizePlan:
    """Everything a resize changes, in order. Truthy when there is anything to do.

    Attributes:
        model: The model's type name.
        old_size: Image size (H, W) before, None when it was not recorded.
        new_size: Image size (H, W) after.
        changes: The changes.
        notes: Remarks for the user, e.g. pixels that the patch grid drops.
    """

    model: str
    old_size: Size | None
    new_size: Size
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    @property
    def tensors(self) -> tuple[Change, ...]:
        """Parameters and buffers, without the attributes."""
        return tuple(c for c in self.changes if c.kind != "attribute")

    def summary(self, attributes: bool = False) -> str:
        """Return the plan as a table: tensor, kind, old → new shape, method; equal rows of blocks are counted.

        Args:
            attributes: List Python attributes too.
        """
        before = text(self.old_size) if self.old_size else "?"
        lines = [f"{self.model}: {before} -> {text(self.new_size)}"]
        rows = list(_merged(c for c in self.changes if attributes or c.kind != "attribute"))
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines += ["  " + "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        if not self.changes:
            lines.append("  nothing to change")
        elif not rows:
            lines.append("  no tensor changes: the size is recorded")
        lines += [f"  note: {note}" for note in self.notes + self.warnings]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def modules(self, model: nn.Module) -> dict[str, Any]:
        """Return the modules of `model` that the plan changes, by path; MISSING for one that is not there."""
        return {path: submodule(model, path) for path in {c.path for c in self.changes}}

    def check(self, model: nn.Module) -> None:
        """Raise StalePlanError unless every change's old side is what `model` holds now."""
        modules = self.modules(model)
        for change in self.changes:
            if change.old is CACHE:
                continue
            have = _current(modules[change.path], change)
            if change.kind == "attribute":
                same = type(have) is type(change.old) and have == change.old
            else:
                same = have == change.old
            if not same:
                raise StalePlanError(
                    f"{self.model}: {change.key} is {have!r}, the plan was made for {change.old!r}. "
                    f"Make a new plan with plan_resize(model, {self.new_size})."
                )


class _Missing:
    """Stands for an attribute that is not there; one object, also after a copy or a pickle."""

    def __reduce__(self) -> str:
        return "MISSING"

    def __repr__(self) -> str:
        return "<missing>"


MISSING = _Missing()


class _Cache:
    """Stands for whatever a cache holds; one object, also after a copy or a pickle."""

    def __reduce__(self) -> str:
        return "CACHE"

    def __repr__(self) -> str:
        return "<cache>"


CACHE = _Cache()
"""Old side of a change that empties a cache, whatever it holds by the time the plan is applied."""


def submodule(root: nn.Module, path: str) -> Any:
    """Return the module at a dotted path, '' for the root; MISSING when there is none."""
    found: Any = root
    for part in path.split(".") if path else ():
        found = found._modules.get(part, MISSING)
        if found is MISSING:
            break
    return found


def shape_of(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Return the shape as a plain tuple, None for None."""
    return None if tensor is None else tuple(tensor.shape)


def _current(module: Any, change: Change) -> Any:
    if module is MISSING:
        return MISSING
    if change.kind == "attribute":
        return module.__dict__.get(change.name, MISSING)
    tensors = module._parameters if change.kind == "parameter" else module._buffers
    return shape_of(tensors[change.name]) if change.name in tensors else MISSING


def _merged(changes: Iterator[Change]) -> Iterator[tuple[str, str, str, str]]:
    """Merge rows that differ only in block numbers: 'blocks.*.attn.table (x12)'."""
    groups: dict[tuple[str, str, str, str], int] = {}
    for c in changes:
        generic = ".".join("*" if part.isdigit() else part for part in c.key.split("."))
        sides = f"{_side(c, c.old)} -> {_side(c, c.new)}"
        row = (generic, c.kind, sides, c.action)
        groups[row] = groups.get(row, 0) + 1
    for (name, kind, sides, action), count in groups.items():
        yield (f"{name} (x{count})" if count > 1 else name), kind, sides, action


def _side(change: Change, value: Any) -> str:
    if change.kind == "attribute":
        return f"{value!r}" if len(repr(value)) <= 40 else "…"
    return "none" if value is None else "x".join(map(str, value)) or "scalar"


def same_value(a: Any, b: Any) -> bool:
    """Whether two attribute values are equal and of the same type, tensors bit for bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
