"""The small faults that benchmarks/mutation.py puts into a file: one operator, constant, argument or statement each."""

# ruff: noqa: N815  (names of ast.NodeVisitor)

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from pathlib import Path

COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARE |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult}
ARITHMETIC |= {ast.Div: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
UNCHANGED = {"clone", "detach", "contiguous", "deepcopy", "copy", "sorted", "reversed"}
"""Calls that a fault leaves out, for what they are called on."""
UNSEEN = {"strict", "stacklevel", "help"}
"""Keywords that change no result."""
UNSWAPPED = {
    "isinstance",
    "issubclass",
    "getattr",
    "hasattr",
    "setattr",
    "replace",
    "removeprefix",
    "get",
    "max",
    "min",
}


@dataclass(frozen=True)
class Fault:
    """One replacement of a piece of source.

    Attributes:
        path: File, relative to the tree.
        place: First line of the function that it is in, 0 for the module.
        start: First byte of what is replaced.
        end: The byte after it.
        text: What stands there instead.
    """

    path: str
    place: int
    start: int
    end: int
    text: str

    @property
    def key(self) -> str:
        return f"{self.path}:{self.start}-{self.end}:{self.text}"

    def source(self, tree: Path) -> tuple[bytes, bytes]:
        """Return the file's bytes, without and with the fault."""
        old = (tree / self.path).read_bytes()
        return old, old[: self.start] + self.text.encode() + old[self.end :]

    def compiles(self, tree: Path) -> bool:
        """Whether what it makes of the file is Python."""
        try:
            compile(self.source(tree)[1], self.path, "exec")
        except (SyntaxError, ValueError):
            return False
        return True

    def diff(self, tree: Path) -> str:
        """Return the changed lines, each with - or + before it."""
        a, b = (side.decode().splitlines() for side in self.source(tree))
        lines = list(difflib.unified_diff(a, b, n=0, lineterm=""))[3:]
        return "\n".join(f"{line[0]} {line[1:].strip()}" for line in lines if not line.startswith("@@"))


class Faults(ast.NodeVisitor):
    """Collects the faults of one file. Texts, annotations, imports, what an error says are left alone."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source, self.found = path, source, []
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.places, self.bound = [0], [set[str]()]
        self.visit(ast.parse(source))

    def put(self, node: ast.expr | ast.stmt, new: ast.AST | str) -> None:
        """Replace a node; an expression stays one in its place."""
        text = new if isinstance(new, str) else f"({ast.unparse(new)})"
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        self.found.append(Fault(self.path, self.places[-1], start, end, text))

    def put_field(self, node: ast.expr, **fields: object) -> None:
        """Replace a node by one with other fields."""
        self.put(node, type(node)(**{**dict(ast.iter_fields(node)), **fields}))

    def visit_function(self, node: ast.FunctionDef) -> None:
        self.places.append(min([node.lineno, *(d.lineno for d in node.decorator_list)]))
        self.bound.append({a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)})
        for part in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(part)
        self.places.pop()
        self.bound.pop()

    def leave(self, node: ast.AST) -> None:
        """Nothing of this is a fault."""

    visit_FunctionDef = visit_function
    visit_JoinedStr = visit_Assert = visit_Import = visit_ImportFrom = leave

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in node.body:
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.put(node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.put(node, "pass")
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        parts = [n for t in node.targets for n in ast.walk(t)]
        names = {n.id for n in parts if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if names <= self.bound[-1]:  # else a NameError, which says nothing
            self.put(node, "pass")
        self.bound[-1] |= names
        types = not self.places[-1] and isinstance(node.value, (ast.BinOp, ast.Subscript))
        if not types and not names & {"__all__", "SMALL", "_SMALL"}:  # the keywords of examples
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.put(node, "pass")
        self.visit(node.value)

    def visit_Continue(self, node: ast.Continue) -> None:
        self.put(node, "pass")

    visit_Break = visit_Continue

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.put(node, "return None")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for i, op in enumerate(node.ops):
            self.put_field(node, ops=[*node.ops[:i], COMPARE[type(op)](), *node.ops[i + 1 :]])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.put_field(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for i in range(len(node.values)):
            rest = [v for k, v in enumerate(node.values) if k != i]
            self.put(node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.put(node, node.operand)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        plain = (ast.JoinedStr, ast.List, ast.Tuple)
        texts = [isinstance(n, plain) or isinstance(getattr(n, "value", 0), str) for n in (node.left, node.right)]
        if type(node.op) in ARITHMETIC and not any(texts):
            self.put_field(node, op=ARITHMETIC[type(node.op)]())
        elif isinstance(node.op, (ast.BitOr, ast.BitAnd)):
            self.put(node, node.left)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.put(node, str(not node.value))
        elif isinstance(node.value, (int, float)):
            self.put(node, f"({node.value + 1})")
            self.put(node, f"({node.value - 1})")

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        if not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
            self.put(node.test, ast.UnaryOp(ast.Not(), node.test))
        self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.put(test, "True")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        plain = not any(isinstance(a, ast.Starred) for a in node.args)
        if name in UNCHANGED and len(node.args) < 2:
            self.put(node, node.args[0] if node.args else getattr(node.func, "value", node))
        if plain and len(node.args) > 1 and name not in UNSWAPPED:
            self.put_field(node, args=[node.args[1], node.args[0], *node.args[2:]])
        for i, keyword in enumerate(node.keywords):
            if keyword.arg not in UNSEEN:
                self.put_field(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
        for part in (node.func, *node.args, *(k.value for k in node.keywords if k.arg not in UNSEEN)):
            self.visit(part)
