"""`infer`: what depends on the image size, told by builds at several sizes, as a table and as a handler."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from timm_resize.builds.entry import Entry, as_size
from timm_resize.builds.forms import Shape, forms
from timm_resize.builds.handler import entries_of, make_plan, size_of
from timm_resize.builds.rules import WORDS, Rule, Unclear, choose, generic, is_mixing
from timm_resize.builds.snapshot import (
    Build,
    Refused,
    Snapshot,
    changed_attributes,
    changed_buffers,
    run,
    structure,
    take,
)
from timm_resize.builds.values import alike, obstacle
from timm_resize.core.plan import MISSING, shape_of, submodule
from timm_resize.core.registry import handler_for, registry
from timm_resize.errors import ResizeError, UnsupportedModelError, near_names
from timm_resize.geometry import Size, SizeLike, parse_size, text

SIZES: tuple[Size, ...] = (
    (224, 224),
    (192, 256),
    (200, 232),
    (320, 224),
    (280, 196),
    (256, 352),
    (448, 224),
    (196, 336),
    (256, 256),
    (320, 320),
    (192, 192),
    (280, 280),
    (384, 384),
    (448, 448),
)
"""Sizes that are tried in turn: multiples of 32, of 14 and of neither, wide and high; squares for what takes no other."""

CHECKS: tuple[Size, ...] = ((288, 192), (252, 308), (224, 448), (384, 256), (288, 288), (336, 336), (512, 512))
"""Sizes of which one that was not used checks what was found."""

ENOUGH, LEAST = 5, 3
"""Builds to look at, and those below which nothing can be told."""


@dataclass(frozen=True)
class Row:
    """One thing that depends on the size, or several that do alike.

    Attributes:
        name: Dotted name, * for the numbers of blocks.
        kind: "parameter", "buffer" or "attribute".
        old: What the build at the first size has: a shape, or an attribute's value.
        new: What the build at the second size has.
        form: How it follows from the image's H and W.
        how: What a resize does to it.
        count: How many there are.
        problem: Why it cannot be carried over, and what to write; '' where it can.
    """

    name: str
    kind: str
    old: object
    new: object
    form: str
    how: str
    count: int = 1
    problem: str = ""


@dataclass(frozen=True)
class Inferred:
    """What `infer` found. Prints as a table.

    Attributes:
        cls: The model's class.
        rows: What depends on the size.
        sizes: Image sizes (H, W) that were looked at; the last one checked what the others told.
        refused: Sizes that the build did not take, with its reasons.
        registered: Whether the class can be resized from now on.
        problems: What stands against that, '' for each that can be carried over.
        note: A remark.
    """

    cls: type[nn.Module]
    rows: tuple[Row, ...]
    sizes: tuple[Size, ...]
    refused: Mapping[Size, str] = field(default_factory=dict)
    registered: bool = False
    problems: tuple[str, ...] = ()
    note: str = ""
    entry: Entry | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        looked = ", ".join(map(text, self.sizes))
        lines = [f"{self.cls.__name__}: built at {looked}{'' if self.registered else ' (not registered)'}"]
        if not self.rows:
            lines.append("  nothing depends on the size")
        cells = [
            (f"{r.name} (x{r.count})" if r.count > 1 else r.name, r.kind, f"{_side(r.old)} -> {_side(r.new)}", r.form, r.how)
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines + ([f"  note: {self.note}"] if self.note else []))


def _side(value: object) -> str:
    if isinstance(value, tuple) and value and all(type(side) is int for side in value):
        return "x".join(map(str, value))
    return repr(value) if len(repr(value)) <= 24 else "…"


def infer(
    build: Build,
    sizes: Sequence[SizeLike] | None = None,
    *,
    hints: Mapping[str, str] | None = None,
    register: bool = True,
    timm: bool = False,
) -> Inferred:
    """Find out what of a model depends on the image size, from builds at several sizes, and teach it to this package.

    Nothing is drawn or computed for the weights, so it takes a few builds' time and no memory to speak of. Every
    parameter that differs between the builds is explained by a closed form, and checked against one more build.

    Args:
        build: Makes the model for an image size (H, W), or for one side if it takes no other. Called again when a
            model of its class is resized. Each configuration of a class wants a call of its own.
        sizes: Image sizes to build at in place of `SIZES`; those that `build` refuses are skipped. The last that it
            takes checks what the others tell.
        hints: What a parameter is where its shapes do not say: name, with * for any part of it, to a word of `WORDS`,
            e.g. {"blocks.*.rel": "table", "pos_embed": "positions:suffix"}.
        register: Register the class, so that `resize_` and all else take its models. Otherwise only tell.
        timm: The class is timm's own, whose factory records sizes.

    Returns:
        What was found; `print` shows it as a table.

    Raises:
        UnsupportedModelError: Something is not explained, or can be explained in two ways; the text says what to write.
        ResizeError: Too few sizes can be built, a hint is not known or matches nothing, or the class has a handler.

    Example:
        >>> import torch, timm_resize
        >>> class Net(torch.nn.Module):
        ...     def __init__(self, img_size):
        ...         super().__init__()
        ...         self.proj = torch.nn.Conv2d(3, 8, 16, 16)
        ...         self.pos = torch.nn.Parameter(torch.zeros(1, img_size[0] // 16 * (img_size[1] // 16), 8))
        ...     def forward(self, x):
        ...         return self.proj(x).flatten(2).transpose(1, 2) + self.pos
        >>> print(timm_resize.infer(Net, register=False))
        Net: built at 224x224, 192x256, 200x232, 320x224, 280x196, 288x192 (not registered)
          pos  parameter  1x196x8 -> 1x192x8  h*w, h = H // 16, w = W // 16  positions
    """
    snapshots, one_side, refused = _look(build, sizes)
    *seen, check = snapshots
    name, cls = type(seen[0].model).__name__, type(seen[0].model)
    if any(type(s.model) is not cls for s in snapshots):
        raise UnsupportedModelError(f"{name}: each build makes a class of its own. Define the class outside of build.")
    if reason := next(filter(None, (structure(seen[0], other) for other in snapshots[1:])), ""):
        raise UnsupportedModelError(f"{name}: {reason}. Write a handler with @timm_resize.register.", model=name)
    found = _Findings(seen, check, build, one_side, dict(hints or {}))
    entry, rows, problems = found.entry(), tuple(_merged(found.rows)), tuple(dict.fromkeys(found.problems))
    if register and problems:
        shown = "; ".join(problems[:8])
        raise UnsupportedModelError(f"{name}: {shown}. infer(..., register=False) prints the table.", model=name)
    if register:
        _teach(cls, entry, timm, rows)
    note = f"it does not run on images alone: {entry.runs}" if entry.runs else ""
    return Inferred(cls, rows, tuple(s.size for s in snapshots), refused, register, problems, note, entry)


def _teach(cls: type[nn.Module], entry: Entry, timm: bool, rows: Sequence[Row]) -> None:
    """Register a class, or one more configuration of a class that was inferred before."""
    handler = handler_for(cls)
    entries = entries_of(handler) if handler is not None and handler.cls is cls else ()
    if entries:
        registry.unregister(cls)
    plan = make_plan((*entries, entry))
    state = ", ".join(dict.fromkeys(row.name for row in rows if row.kind != "attribute"))
    size = None if timm else size_of((*entries, entry))
    registry.register(cls, state=state, method="inferred from builds", sizes="as built", examples={}, size=size)(plan)


def _look(build: Build, sizes: Sequence[SizeLike] | None) -> tuple[list[Snapshot], bool, dict[Size, str]]:
    """Return builds at enough sizes, the last to check with, whether they are of one side, and what was refused."""
    given = None if sizes is None else list(dict.fromkeys(parse_size(size, "sizes", "infer") for size in sizes))
    refused: dict[Size, str] = {}
    for one_side in (False, True):
        found: list[Snapshot] = []
        tried = SIZES if given is None else given
        squares = [size for size in tried if size[0] == size[1]]
        for size in squares if one_side else tried:
            found += _taken(build, size, one_side, refused)
            if given is None and len(found) == ENOUGH:
                break
        if not found:
            continue
        if given is None:
            checks = (size for size in CHECKS if size[0] == size[1] or not _square_only(found))
            found += next(filter(None, (_taken(build, size, one_side, refused) for size in checks)), [])
        if len(found) > LEAST:
            return found, one_side, refused
    reasons = "; ".join(f"{text(size)}: {why}" for size, why in list(refused.items())[:3])
    raise ResizeError(
        f"infer: build takes too few sizes to tell: {LEAST + 1} are needed, of {len(SIZES if given is None else given)} "
        f"tried. {reasons or 'None was refused'}. Give sizes=[(H, W), ...] that it takes."
    )


def _taken(build: Build, size: Size, one_side: bool, refused: dict[Size, str]) -> list[Snapshot]:
    """Return the build at a size, as a list, empty where it is refused."""
    try:
        return [take(build, size, one_side=one_side)]
    except Refused as why:
        refused[size] = str(why)
        return []


def _square_only(found: Sequence[Snapshot]) -> bool:
    return all(s.size[0] == s.size[1] for s in found)


class _Findings:
    """What the builds tell, row by row."""

    def __init__(
        self, seen: list[Snapshot], check: Snapshot, build: Build, one_side: bool, hints: dict[str, str]
    ) -> None:
        """Look at the builds `seen`; `check` is for the end."""
        self.seen, self.check, self.build, self.one_side, self.hints = seen, check, build, one_side, hints
        self.sizes = [s.size for s in seen]
        self.rows: list[Row] = []
        self.problems: list[str] = []
        self.rules: dict[str, Rule] = {}
        pairs = [(seen[0], other) for other in (*seen[1:], check)]
        self.attributes = list(dict.fromkeys(key for a, b in pairs for key in changed_attributes(a, b)))
        self.buffers = list(dict.fromkeys(key for a, b in pairs for key in changed_buffers(a, b)))
        self.random = self._random()
        self._parameters()
        self._size_free()
        for key in self.buffers:
            self._buffer(key)
        for path, name in self.attributes:
            self._attribute(path, name)

    def entry(self) -> Entry:
        """Return what the handler needs to know."""
        keys = [(*self.rules, *self.buffers)] if self.rules or self.buffers else []
        tried = {s.size: {key: _shape(s, key) for key in keys[0]} for s in (*self.seen, self.check)} if keys else {}
        return Entry(self.build, self.one_side, self.rules, self.random, self.runs, tried, self._size_attributes())

    def _parameters(self) -> None:
        shapes = {
            key: [s.shapes[key] or () for s in self.seen]
            for key in self.seen[0].shapes
            if any(s.shapes[key] != self.seen[0].shapes[key] for s in (*self.seen, self.check))
        }
        hints = self._hints(list(shapes))
        reorders = self._reorders()
        for key, column in shapes.items():
            owner = submodule(self.seen[0].model, key.rpartition(".")[0])
            assert owner is not None
            form, how, problem = "?", "?", ""
            try:
                found = forms(self.sizes, column, channels=is_mixing(owner))
                rule = choose(found, owner, key, column[0], hints.get(key, ""), reorders)
                form, how = " and ".join(map(str, rule.forms)), str(rule)
                self._check(key, rule)
                self.rules[key] = rule
            except Unclear as why:
                problem = f"{generic(key)}: {why}"
                self.problems.append(problem)
            self.rows.append(Row(key, "parameter", column[0], column[1], form, how, problem=problem))

    def _check(self, key: str, rule: Rule) -> None:
        """Raise Unclear where a rule does not foresee the build at a size that it was not made from."""
        shape = self.check.shapes[key] or ()
        if not all(form.at(self.check.size, shape) for form in rule.forms):
            texts = " and ".join(map(str, rule.forms))
            raise Unclear(
                f"{texts} does not foresee {shape} at {self.check.size}. Give more sizes=[(H, W), ...], or write a "
                "handler with @timm_resize.register"
            )

    def _hints(self, keys: list[str]) -> dict[str, str]:
        """Return the hint of each parameter, the last pattern that matches its name."""
        out: dict[str, str] = {}
        for pattern, word in self.hints.items():
            if word not in WORDS:
                near = near_names(word, list(WORDS))
                advice = f"Did you mean {near}?" if near else f"Use {', '.join(WORDS)}."
                raise ResizeError(f"infer: hints={{{pattern!r}: {word!r}}} is not known. {advice}")
            matched = [key for key in keys if fnmatch.fnmatchcase(key, pattern)]
            if not matched:
                names = list(dict.fromkeys(map(generic, keys)))
                near = near_names(pattern, names) or ", ".join(names[:8])
                advice = f"Did you mean {near}?" if near else "No parameter does."
                raise ResizeError(f"infer: hints={{{pattern!r}: ...}} matches no parameter that differs. {advice}")
            out |= dict.fromkeys(matched, word)
        return out

    def _reorders(self) -> str:
        """Return a module that has nothing but the grid, and so may put tokens into an order of its own; '' for none."""
        for path in dict.fromkeys(path for path, _ in self.attributes if path):
            module = submodule(self.seen[0].model, path)
            assert module is not None
            if not any(True for _ in (*module.parameters(), *module.buffers(), *module.children())):
                return f"{path}, a {type(module).__name__} that holds nothing but the grid,"
        return ""

    def _random(self) -> frozenset[str]:
        """Return the buffers that differ between builds of one size."""
        suspects = [
            key
            for key in self.buffers
            if (b := self.seen[0].buffers[key]) is not None
            and b.is_floating_point()
            and all(_shape(s, key) == shape_of(b) for s in (*self.seen, self.check))
        ]
        if not suspects:
            return frozenset()
        again = take(self.build, self.sizes[0], one_side=self.one_side, seed=1)
        random = frozenset(changed_buffers(self.seen[0], again)) & set(suspects)
        self.buffers = [key for key in self.buffers if key not in random]
        return random

    def _size_free(self) -> None:
        """Run the build, which a class whose builds do not differ has to stand at another size."""
        last = self.seen[-1]
        self.runs = last.ran.failed and self.seen[0].ran.failed
        if last.ran.refilled:
            names = ", ".join(dict.fromkeys(map(generic, last.ran.refilled)))
            self.problems.append(
                f"forward replaces {names} by what it makes of its input, whether rightly or not. Write a handler with "
                "@timm_resize.register"
            )
        if self.rules or self.buffers or self.problems:
            return
        failed = self.runs or run(self.seen[0], self.check.size).failed
        if failed and (self.runs or not self.attributes):
            what = "it cannot be run on one image tensor" if self.runs else f"it does not run at {self.check.size}"
            self.problems.append(f"no tensor of its builds differs, and {what}: {failed}")

    def _buffer(self, key: str) -> None:
        owner = submodule(self.seen[0].model, key.rpartition(".")[0])
        shapes = [_shape(s, key) for s in self.seen]
        problem = ""
        if type(owner).__module__.startswith("torch.nn."):
            problem = f"{generic(key)} is what a {type(owner).__name__} has learned, one value for each token. Write a handler with @timm_resize.register"
            self.problems.append(problem)
        form = "by value" if len(set(shapes)) == 1 else self._form([s for s in shapes if s is not None])
        self.rows.append(Row(key, "buffer", shapes[0], shapes[1], form, "as built", problem=problem))

    def _attribute(self, path: str, name: str) -> None:
        values = [s.attributes[path].get(name, MISSING) for s in self.seen]
        key = f"{path}.{name}".removeprefix(".")
        problem = ""
        if what := next(filter(None, map(obstacle, values)), ""):
            problem = f"{generic(key)} holds {what}. Register it in its module, or write a handler with @timm_resize.register"
            self.problems.append(problem)
        pairs = [as_size(value) for value in values]
        if pairs == self.sizes:
            form = "H, W" if not isinstance(values[0], int) else "H"
        else:
            flat = [(v,) if type(v) is int else v for v in values]
            form = self._form([tuple(v) for v in flat if isinstance(v, (tuple, list))])
        self.rows.append(Row(key, "attribute", values[0], values[1], form, "as built", problem=problem))

    def _form(self, shapes: list[Shape]) -> str:
        """Write what shapes, or numbers, are of; '…' for what has no simple form."""
        plain = len(shapes) == len(self.sizes) and len({len(shape) for shape in shapes}) == 1
        if not plain or any(type(side) is not int for shape in shapes for side in shape):
            return "…"
        found = forms(self.sizes, shapes, channels=True)
        return " and ".join(map(str, found[0])) if found else "…"

    def _size_attributes(self) -> list[tuple[str, str]]:
        """Return the attributes that are the image size at each build, those of the model itself and pairs first."""
        every = (*self.seen, self.check)
        found = [
            (path, name)
            for path, name in self.attributes
            if all(as_size(s.attributes[path].get(name)) == s.size for s in every)
        ]
        first = self.seen[0].attributes
        return sorted(found, key=lambda at: (isinstance(first[at[0]][at[1]], int), at[0].count("."), bool(at[0])))


def _shape(snapshot: Snapshot, key: str) -> Shape | None:
    return snapshot.shapes[key] if key in snapshot.shapes else shape_of(snapshot.buffers[key])


def _merged(rows: Sequence[Row]) -> Iterator[Row]:
    """Merge rows that differ only in the numbers in their names."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (generic(row.name), row.kind, repr(row.old), repr(row.new), row.form, row.how)
        groups.setdefault(key, []).append(row)
    for key, same in groups.items():
        first = same[0]
        name = key[0] if len(same) > 1 else first.name
        yield Row(name, first.kind, first.old, first.new, first.form, first.how, len(same), first.problem)
