"""Count what a visitor of the source sees: rooms, modules, arrows between them, lines, `Any`. Measured, not estimated.

python benchmarks/house.py                counts of the working tree
python benchmarks/house.py --at 646911a   beside those of a commit
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.helpers.imports import PACKAGE, Module, arrows, between_rooms, circles, floors, functions, read

Counts = dict[str, int]


def count(modules: dict[str, Module]) -> Counts:
    """Return every count by its name."""
    graph, rooms = arrows(modules), between_rooms(modules)
    lines = {name: m.source.count("\n") for name, m in modules.items()}
    lengths = [length for m in modules.values() for _, length in functions(m)]
    return {
        "lines of package": sum(lines.values()),
        "modules": len(modules),
        "arrows between modules": sum(map(len, graph.values())),
        "floors of modules": floors(graph),
        "circles of modules": len(circles(graph)),
        "modules in circles": sum(map(len, circles(graph))),
        "rooms": len(rooms),
        "arrows between rooms": sum(map(len, rooms.values())),
        "floors of rooms": floors(rooms),
        "circles of rooms": len(circles(rooms)),
        "# fmt: skip": sum(m.source.count("# fmt: skip") for m in modules.values()),
        "Any": sum(tokens(m, "Any") for m in modules.values()),
        "type: ignore": sum(m.source.count("# type: ignore") for m in modules.values()),
        "functions of more than 60 lines": sum(length > 60 for length in lengths),
        "files of more than 400 lines": sum(n > 400 for n in lines.values()),
    }


def tokens(module: Module, word: str) -> int:
    """Count a word among a module's tokens: not in strings and comments."""
    found = tokenize.generate_tokens(io.StringIO(module.source).readline)
    return sum(token.type == tokenize.NAME and token.string == word for token in found)


def lines_by_room(modules: dict[str, Module]) -> Counts:
    """Return the lines of each room."""
    out: Counts = {}
    for module in modules.values():
        is_folder = any(name.startswith(f"{module.room}.") for name in modules)
        room = f"{module.room}/" if is_folder else f"{module.room or '__init__'}.py"
        out[room] = out.get(room, 0) + module.source.count("\n")
    return dict(sorted(out.items(), key=lambda item: -item[1]))


def read_at(revision: str) -> dict[str, Module]:
    """Return the modules of a commit."""
    archive = subprocess.run(
        ["git", "archive", revision, PACKAGE.name], cwd=PACKAGE.parent, capture_output=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder)
        return read(Path(folder) / PACKAGE.name)


def table(columns: dict[str, Counts]) -> str:
    """Set counts side by side; '-' where a column lacks one."""
    names = list(dict.fromkeys(name for counts in columns.values() for name in counts))
    rows = [["", *columns], *([n, *(str(c.get(n, "-")) for c in columns.values())] for n in names)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", metavar="REV", action="append", default=[], help="a commit to compare with")
    parser.add_argument("--any", action="store_true", help="list the modules with the most `Any`")
    args = parser.parse_args()
    now = read()
    columns = {**{revision: read_at(revision) for revision in args.at}, "now": now}
    print(table({name: count(modules) for name, modules in columns.items()}))
    print("\nlines of each room\n" + table({name: lines_by_room(modules) for name, modules in columns.items()}))
    if args.any:
        most = sorted(((tokens(m, "Any"), m.name) for m in now.values()), reverse=True)
        print("\nAny\n" + "\n".join(f"{number:4} {name}" for number, name in most if number))


if __name__ == "__main__":
    main()
