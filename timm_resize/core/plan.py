"""What a resize would do, as values: changes, the plan that lists them, and checks against a model."""

from __future__ import annotations

import html
from collections.abc import Callable, Hashable, Iterator, Mapping
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
    args: tuple[Hashable, ...] = ()
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


@dataclass(frozen=True, repr=False)
class ResizePlan:
    """Everything a resize changes, in order. Truthy when there is anything to do.

    It prints as the table of `summary`; a notebook shows the same. What it costs a model is in
    `timm_resize.cost.before_and_after(model, plan)`.

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

    def __repr__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as what JSON can say.

        Returns:
            - `schema`: 1. A name that is here now keeps its meaning as long as this is 1; others may come.
            - `model`: The model's type name.
            - `old_size`, `new_size`: [H, W] in pixels; the old one is null when it was not recorded.
            - `changes`: In order, each with `name` (dotted, as in a state dict), `kind` ("parameter", "buffer" or
                "attribute"), `action` (as in the table: "resampled: bicubic antialias", "rebuilt", "set" …), `old`
                and `new`: the shape of a tensor, null for none; the value of an attribute, as text where JSON has none.
            - `notes`, `warnings`: Remarks for the user.

        Example:
            >>> import timm, timm_resize
            >>> model = timm.create_model("vit_tiny_patch16_224", device="meta")
            >>> [c["new"] for c in timm_resize.plan_resize(model, 384).to_dict()["changes"] if c["kind"] == "parameter"]
            [[1, 577, 192]]
        """
        changes = [
            {"name": c.key, "kind": c.kind, "action": c.action, "old": _plain(c.old), "new": _plain(c.new)}
            for c in self.changes
        ]
        return {
            "schema": 1,
            "model": self.model,
            "old_size": _plain(self.old_size),
            "new_size": _plain(self.new_size),
            "changes": changes,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        heading, *rest = self.summary().splitlines()
        rows = list(_merged(c for c in self.changes if c.kind != "attribute"))
        notes = rest[len(rows) :]
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        head = "".join(f"<th>{title}</th>" for title in ("tensor", "kind", "shape", "method")) if rows else ""
        lines = "".join(f"<p>{html.escape(line.strip())}</p>" for line in notes)
        return f"<b>{html.escape(heading)}</b><table>{head and f'<tr>{head}</tr>'}{body}</table>{lines}"

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules of `model` that the plan changes, by path, as far as they are there."""
        found = ((path, submodule(model, path)) for path in {c.path for c in self.changes})
        return {path: module for path, module in found if module is not None}

    def check(self, model: nn.Module) -> None:
        """Raise StalePlanError unless every change's old side is what `model` holds now."""
        modules = self.modules(model)
        for change in self.changes:
            have = _current(modules.get(change.path), change)
            if change.old is not CACHE and not same_value(have, change.old):
                raise StalePlanError(
                    f"{self.model}: {change.key} is {have!r}, the plan was made for {change.old!r}. "
                    f"Make a new plan with plan_resize(model, {self.new_size}).",
                    model=self.model,
                )


class Mark:
    """Stands for something that is no value; one object, also after a copy or a pickle."""

    def __init__(self, name: str) -> None:
        """Take the name of the global that holds it."""
        self.name = name

    def __reduce__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{self.name.lower()}>"


MISSING = Mark("MISSING")
"""Either side of a change of an attribute that is not there then."""

CACHE = Mark("CACHE")
"""Old side of a change that empties a cache, whatever it holds by the time the plan is applied."""


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path, '' for the root; None when there is none."""
    found: nn.Module | None = root
    for part in path.split(".") if path else ():
        found = found._modules.get(part) if found is not None else None
    return found


def tensor_of(module: nn.Module, change: Change) -> Tensor | None:
    """Return the parameter or buffer of a module that a change is of."""
    tensors: Mapping[str, Tensor | None] = module._parameters if change.kind == "parameter" else module._buffers
    return tensors.get(change.name)


def shape_of(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Return the shape as a plain tuple, None for None."""
    return None if tensor is None else tuple(tensor.shape)


def _current(module: nn.Module | None, change: Change) -> object:
    """Return what a model has now where the change has its old side."""
    if module is None:
        return MISSING
    if change.kind == "attribute":
        return module.__dict__.get(change.name, MISSING)
    return shape_of(tensor_of(module, change))


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


def _plain(value: object) -> object:
    """Return a value as JSON has it: containers too, anything else as text."""
    if value is None or value is MISSING:
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (bool, int, float, str)):
        return value
    return f"{type(value).__name__} {'x'.join(map(str, value.shape))}" if isinstance(value, Tensor) else repr(value)


def same_value(a: object, b: object) -> bool:
    """Whether two attribute values are equal and of the same type; tensors bit for bit, in containers too."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and (a.is_meta or torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_value, a, b))
    return bool(a == b)
