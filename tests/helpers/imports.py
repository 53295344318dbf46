"""The package as `ast` reads it: its modules, what each imports, and where one writes to another package's names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "timm_resize"

Arrows = dict[str, set[str]]


@dataclass(frozen=True)
class Module:
    """A file of the package.

    Attributes:
        name: Dotted name below the package, '' for its `__init__`.
        source: Text.
        tree: The same, parsed.
        own: Dotted names, below the package, of everything that it imports from the package.
        foreign: Dotted names of everything else that it imports.
    """

    name: str
    source: str
    tree: ast.Module
    own: frozenset[str]
    foreign: frozenset[str]

    @property
    def room(self) -> str:
        """The folder or file right below the package."""
        return self.name.split(".")[0]


def read(package: Path = PACKAGE) -> dict[str, Module]:
    """Return the modules of a package by their dotted names below it."""
    out = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        source = path.read_text()
        tree = ast.parse(source)
        found = set(_imported(tree))
        own = {n.removeprefix(package.name).removeprefix(".") for n in found if n.split(".")[0] == package.name}
        foreign = {n for n in found if n.split(".")[0] != package.name}
        out[name] = Module(name, source, tree, frozenset(own), frozenset(foreign))
    return out


def _imported(tree: ast.AST) -> Iterator[str]:
    """Yield 'a.b.c' for `import a.b.c` and for `from a.b import c`, wherever it stands in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(modules: dict[str, Module]) -> Arrows:
    """Return which modules of the package each imports: `from a.b import c` is of a.b.c where that is a module."""
    return {
        name: {n if n in modules else n.rpartition(".")[0] for n in module.own} - {name}
        for name, module in modules.items()
    }


def between_rooms(modules: dict[str, Module]) -> Arrows:
    """Return which rooms each room imports."""
    out: Arrows = {module.room: set() for module in modules.values()}
    for name, targets in arrows(modules).items():
        out[modules[name].room] |= {modules[t].room for t in targets} - {modules[name].room}
    return out


def circles(graph: Arrows) -> list[set[str]]:
    """Return the sets of nodes that reach one another, each once."""
    reach = {node: _reached(graph, node) for node in graph}
    found = [{other for other in reach[node] if node in reach[other]} for node in graph if node in reach[node]]
    return [ring for i, ring in enumerate(found) if ring not in found[:i]]


def _reached(graph: Arrows, start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += graph[node]
    return seen


def floors(graph: Arrows) -> int:
    """Return how many nodes the longest way along the arrows has; those of a circle count as one floor."""
    rings = circles(graph)
    ring_of = {node: frozenset(next((r for r in rings if node in r), {node})) for node in graph}
    height: dict[frozenset[str], int] = {}

    def floor(ring: frozenset[str]) -> int:
        if ring not in height:
            below = {ring_of[t] for node in ring for t in graph[node]} - {ring}
            height[ring] = 1 + max(map(floor, below), default=0)
        return height[ring]

    return max(floor(ring) for ring in ring_of.values())


def functions(module: Module) -> Iterator[tuple[str, int]]:
    """Yield the functions of a module with their lengths in lines."""
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


def identifiers(module: Module) -> Iterator[str]:
    """Yield every name in a module that is bound or used: variables, attributes, functions, classes, arguments."""
    yield from module.name.split(".")
    for node in ast.walk(module.tree):
        for value in (getattr(node, field, None) for field in ("id", "attr", "name", "arg", "asname")):
            if isinstance(value, str):
                yield value


def words(identifier: str) -> list[str]:
    """Split an identifier into its words, in lower case.

    Example:
        >>> words("_SizeLike_of2")
        ['size', 'like', 'of']
    """
    return [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)]


def foreign_writes(module: Module) -> list[str]:
    """Return the statements of a module that write to a name, class attribute or code of another package.

    What it sees: assignments, `del`, `setattr` and `delattr`, through attributes, items, `vars` and `__dict__`, where
    the root name was imported from another package in this file, or was bound to such a name or to an entry of
    `sys.modules`; and any assignment to a `__code__` or to an attribute of `type(...)`. What it cannot see: an object
    that came in as an argument.
    """
    foreign = {name.split(".")[0] for name in module.foreign}
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                source = node.module if isinstance(node, ast.ImportFrom) else alias.name
                if source and source.split(".")[0] in foreign:
                    foreign.add((alias.asname or alias.name).split(".")[0])
    aliases = [n for n in ast.walk(module.tree) if isinstance(n, ast.Assign) and _root(n.value, calls=False) in foreign]
    foreign |= {t.id for n in aliases for t in n.targets if isinstance(t, ast.Name)}
    return [ast.unparse(t) for t in _written(module.tree) if _root(t) in foreign or _of_class(t)]


def _written(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield what is written to through an attribute or an item; of `setattr` and `delattr` the call."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            written = not isinstance(node.ctx, ast.Load)
        else:
            written = isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr")
        if written and isinstance(node, ast.expr):
            yield node


def _root(node: ast.expr, calls: bool = True) -> str:
    """Return the name at the root of a.b[c].d, of vars(a)[c] and of setattr(a, ...); '' where there is none."""
    while True:
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _THROUGH and node.args:
            node = node.args[0]
        elif isinstance(node, ast.Call) and calls is False and ast.unparse(node.func).startswith("sys.modules"):
            return "sys"
        else:
            return node.id if isinstance(node, ast.Name) else ""


_THROUGH = ("vars", "setattr", "delattr")


def _of_class(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and (
        node.attr == "__code__"
        or (isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name) and node.value.func.id == "type")
    )
