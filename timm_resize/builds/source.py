"""What `infer` found, as the source of a handler: to read, and to go on from by hand."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from timm_resize.builds.forms import Form, Grid
from timm_resize.builds.table import Row

Grids = dict[str, Grid]
"""Functions that the handler needs, by name."""


def handler_source(
    cls: type[nn.Module], rows: Sequence[Row], table: str, examples: Mapping[str, Mapping[str, object]]
) -> str:
    """Return the source of a handler that does what the table says.

    What no form says, such as how a buffer is filled, is left as `...`, with the values of two builds.

    Args:
        cls: The model's class.
        rows: What depends on the size.
        table: The same as a table, for the docstring.
        examples: Registered names with keywords, for `register`.
    """
    grids: Grids = {}
    body = "\n".join(line for row in rows for line in _lines(row, grids)) or "yield from ()"
    functions = "".join(
        f'''

def {name}(size: tuple[int, int]) -> tuple[int, int]:
    """Return the grid (h, w) of an image (H, W)."""
    H, W = size
    return {grid[0].text("H")}, {grid[1].text("W")}
'''
        for name, grid in grids.items()
    )
    name = cls.__name__
    state = ", ".join(dict.fromkeys(row.name for row in rows if row.kind != "attribute"))
    uses = [name for name in ("Changes", "Context", "Rebuild", "register") if name != "Rebuild" or name in body]
    return f'''"""How {name} follows the image size, by what its builds show. Forward may round otherwise.

{table}
"""

{"import math" + chr(10) * 2 if "math." in body else ""}from {cls.__module__} import {name}

from timm_resize import {", ".join(uses)}
{functions}

@register({name}, state={state!r}, method="...", sizes="any", examples={dict(examples)!r})
def plan_{name.lower()}(model: {name}, ctx: Context) -> Changes:
    """Say in a line what changes. Equal rows of blocks want a loop; layers that have handlers want ctx.visit."""
    old, new = ctx.old_size, ctx.new_size
{textwrap.indent(body, "    ")}
'''


def _lines(row: Row, grids: Grids) -> Iterator[str]:
    """Write what a handler yields for a row; `[...]` stands for the numbers of those that do alike."""
    path, _, name = row.name.rpartition(".")
    parts = (
        f"[{part.replace('*', '...')}]" if part in "*0123456789" else f".{part}" for part in path.split(".") if part
    )
    owner, sides = "model" + "".join(parts), textwrap.shorten(f"{row.old!r} -> {row.new!r}", 60, placeholder="...")
    comment = f"  # {f'{row.count} of them, ' if row.count > 1 else ''}{sides}"
    if row.kind == "attribute":
        yield f"yield from ctx.attribute({owner}, {name}={_value(row, grids)}){comment}"
    elif row.kind == "buffer":
        yield f'yield from ctx.buffer({owner}, "{name}", ..., Rebuild(..., (...,))){comment}'
    else:
        of = [f"{name}(old), {name}(new)" for name in (_grid(f, grids) for f in (row.rule.forms if row.rule else ()))]
        yield f'yield from ctx.parameter({owner}, "{name}", {row.rule.call(of) if row.rule else "..."}){comment}'


def _value(row: Row, grids: Grids) -> str:
    """Write an attribute's new value."""
    if row.form == "H":
        return "new[0]"
    if row.form == "H, W":
        return "list(new)" if isinstance(row.old, list) else "new"
    if row.reading is None or row.reading.rest or row.reading.what not in ("map", "cells"):
        return "..."
    grid, times = f"{_grid(row.reading, grids)}(new)", row.reading.times
    if row.reading.what == "map":
        return f"list({grid})" if isinstance(row.old, list) else grid
    return f"{times} * math.prod({grid})" if times > 1 else f"math.prod({grid})"


def _grid(form: Form, grids: Grids) -> str:
    """Return the name of the function for a form's grid."""
    grid = form.grids[0]
    known = next((name for name, other in grids.items() if other == grid), "")
    if not known:
        grids[known := f"grid_{len(grids) + 1}"] = grid
    return known
