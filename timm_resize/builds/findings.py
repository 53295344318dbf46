"""What differs between the builds of a model, each thing with the closed form that it follows."""

from __future__ import annotations

import fnmatch
from dataclasses import replace

from timm_resize.builds.entry import Entry, as_size
from timm_resize.builds.forms import Form, Shape, forms
from timm_resize.builds.rules import WORDS, Rule, Unclear, choose, generic, is_mixing, is_offset_index
from timm_resize.builds.snapshot import Build, Snapshot, changed_attributes, changed_buffers, run, take
from timm_resize.builds.table import Row
from timm_resize.builds.values import obstacle
from timm_resize.core.plan import MISSING, shape_of, submodule
from timm_resize.errors import ResizeError, near_names
from timm_resize.geometry import Size

ROUND: tuple[Size, ...] = ((256, 256), (512, 256))
"""Sizes that models take whose maps have to be whole blocks."""

LARGE: Size = (2048, 4096)
"""A size at which state of a size of its own shows, such as a table of positions that forward cuts to length."""

ELSE = "write a handler with @timm_resize.register"
"""What is left where nothing else helps."""


class Findings:
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
        self._run()
        for key in self.buffers:
            self._buffer(key)
        for path, name in self.attributes:
            self._attribute(path, name)

    def entry(self) -> Entry:
        """Return what the handler needs to know."""
        tried = {
            s.size: {key: _shape(s, key) for key in (*self.rules, *self.buffers)} for s in (*self.seen, self.check)
        }
        attributes, free = self._size_attributes(), not self.rows
        return Entry(self.build, self.one_side, self.rules, self.random, self.runs, tried, attributes, free)

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
            row = Row(key, "parameter", column[0], column[1], "?", "?")
            try:
                found = forms(self.sizes, column, channels=is_mixing(owner))
                indexed = any(self._is_indexed(key, form[0]) for form in found)
                hint = hints.get(key, "")
                rule = choose(found, owner, key, column[0], hint=hint, reorders=reorders, indexed=indexed)
                self.rules[key] = rule = self._checked(key, rule)
                row = replace(row, form=" and ".join(map(str, rule.forms)), how=str(rule), rule=rule)
            except Unclear as why:
                row = replace(row, problem=f"{generic(key)}: {why}", choices=why.choices)
                self.problems.append(row.problem)
            self.rows.append(row)

    def _is_indexed(self, key: str, form: Form) -> bool:
        """Whether a buffer beside a parameter is an index of absolute offsets into it."""
        path, first = key.rpartition(".")[0], self.seen[0]
        grid = form.of(self.sizes[0])
        beside = (b for name, b in first.buffers.items() if name.rpartition(".")[0] == path)
        return form.what == "cells" and form.rest == 0 and any(is_offset_index(b, grid) for b in beside)

    def _checked(self, key: str, rule: Rule) -> Rule:
        """Return a rule with those of its grids that foresee the build at a size which they were not made from.

        Raises:
            Unclear: None does.
        """
        shape = self.check.shapes[key] or ()
        kept = [form.narrowed(self.check.size, shape) for form in rule.forms]
        if None in kept:
            texts = " and ".join(map(str, rule.forms))
            raise Unclear(
                f"{texts} does not foresee {shape} at {self.check.size}. Give more sizes=[(H, W), ...], or {ELSE}"
            )
        return replace(rule, forms=tuple(filter(None, kept)))

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
        """Return a module that has nothing but the grid, and so may put tokens into its own order; '' for none."""
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

    def _run(self) -> None:
        """Run the builds without values; a class whose builds do not differ has to run at two sizes as it is."""
        first, last = self.seen[0], self.seen[-1]
        ran = (last.ran, first.ran) if last.ran.failed else (last.ran,)
        self.runs = ran[-1].failed
        if refilled := dict.fromkeys(generic(name) for r in ran for name in r.refilled):
            names = ", ".join(refilled)
            self.problems.append(f"forward replaces {names} by what it makes of its input, rightly or not; {ELSE}")
        if self.rules or self.buffers or self.problems:
            return
        if self.attributes and not self.runs:
            return
        large, *failed = (run(first, size).failed for size in (LARGE, self.check.size, *ROUND))
        if not large and failed.count("") > 1 and not self.attributes:
            self.runs = ""
            return
        why = next(filter(None, (large, self.runs, *failed)), "")
        self.problems.append(f"no tensor of its builds differs, and it does not run on one image of any size: {why}")

    def _buffer(self, key: str) -> None:
        owner = submodule(self.seen[0].model, key.rpartition(".")[0])
        shapes = [_shape(s, key) for s in self.seen]
        problem = ""
        if type(owner).__module__.startswith("torch.nn."):
            problem = f"{generic(key)} is what a {type(owner).__name__} has learned, a value for each token; {ELSE}"
            self.problems.append(problem)
        form = "by value" if len(set(shapes)) == 1 else _text(self._read([s for s in shapes if s is not None]))
        self.rows.append(Row(key, "buffer", shapes[0], shapes[1], form, "as built", problem=problem))

    def _attribute(self, path: str, name: str) -> None:
        values = [s.attributes[path].get(name, MISSING) for s in self.seen]
        key = f"{path}.{name}".removeprefix(".")
        problem = ""
        if what := next(filter(None, map(obstacle, values)), ""):
            problem = f"{generic(key)} holds {what}. Register that in its module, or {ELSE}"
            self.problems.append(problem)
        row = Row(key, "attribute", values[0], values[1], "", "as built", problem=problem)
        if [as_size(value) for value in values] == self.sizes:
            row = replace(row, form="H" if isinstance(values[0], int) else "H, W")
        else:
            shapes = [(value,) if type(value) is int else value for value in values]
            found = self._read([tuple(shape) for shape in shapes if isinstance(shape, (tuple, list))])
            row = replace(row, form=_text(found), reading=found[0] if len(found) == 1 else None)
        self.rows.append(row)

    def _read(self, shapes: list[Shape]) -> tuple[Form, ...]:
        """Return what shapes, or numbers, are of; nothing where they have no simple form."""
        plain = len(shapes) == len(self.sizes) and len({len(shape) for shape in shapes}) == 1
        if not plain or any(type(side) is not int for shape in shapes for side in shape):
            return ()
        return next(iter(forms(self.sizes, shapes, channels=True)), ())

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


def _text(found: tuple[Form, ...]) -> str:
    return " and ".join(map(str, found)) or "…"
