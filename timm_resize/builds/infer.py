"""`infer`: what depends on the image size, told by builds at several sizes, as a table and as a handler."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from timm_resize.builds.entry import Entry
from timm_resize.builds.findings import Findings
from timm_resize.builds.handler import entries_of, make_plan, size_of
from timm_resize.builds.inferred import Inferred
from timm_resize.builds.snapshot import Build, Refused, Snapshot, structure, take
from timm_resize.builds.table import Row, merged
from timm_resize.core.find import current_size, model_handler
from timm_resize.core.planner import takes_img_size
from timm_resize.core.registry import handler_for, registry
from timm_resize.errors import ResizeError, UnsupportedModelError
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
"""Sizes that are tried in turn: multiples of 32, of 14 and of neither, wide and high; then squares."""

CHECKS: tuple[Size, ...] = ((288, 192), (252, 308), (224, 448), (384, 256), (288, 288), (336, 336), (512, 512))
"""Sizes of which one that was not used checks what was found."""

ENOUGH, LEAST = 5, 3
"""Builds to look at, and those below which nothing can be told."""


def infer(
    build: Build,
    sizes: Sequence[SizeLike] | None = None,
    *,
    hints: Mapping[str, str] | None = None,
    register: bool = True,
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
    found = Findings(seen, check, build, one_side, dict(hints or {}))
    entry, rows, problems = found.entry(), tuple(merged(found.rows)), tuple(dict.fromkeys(found.problems))
    if register and problems:
        shown = "; ".join(problems[:8])
        raise UnsupportedModelError(f"{name}: {shown}. infer(..., register=False) prints the table.", model=name)
    if register:
        _teach(cls, entry, hasattr(seen[0].model, "pretrained_cfg"), rows)
    note = f"it does not run on images alone: {entry.runs}" if entry.runs else ""
    return Inferred(cls, rows, tuple(s.size for s in snapshots), refused, register, problems, note, entry)


def of_timm(create: Callable[..., nn.Module]) -> Build:
    """Return a build from a function that takes `img_size` where the constructor of timm's does, and no argument else.

    Raises:
        ResizeError: It builds nothing.
    """
    try:
        cls = type(take(lambda _: create(), SIZES[0]).model)
    except Refused as why:
        raise ResizeError(f"infer: the model cannot be built: {why}.") from why
    return _sized(cls, create)


def _sized(cls: type[nn.Module], create: Callable[..., nn.Module]) -> Build:
    takes = any(takes_img_size(base) for base in cls.__mro__ if issubclass(base, nn.Module))  # it may pass on keywords
    return (lambda img_size: create(img_size=img_size)) if takes else lambda img_size: create()


def infer_for(model: nn.Module, create: Callable[..., nn.Module]) -> None:
    """Teach the class of a model that timm built and that has no handler, or its configuration; with a warning.

    Args:
        model: The model.
        create: Makes another like it, of an `img_size` if its constructor takes one.

    Raises:
        ResizeError: As `infer`.
    """
    cls, handler, size = type(model), model_handler(model), current_size(model)
    if cls.__module__.startswith("timm.models._features") or size is None:
        return
    entries = entries_of(handler)
    if handler is not None and (not entries or any(entry.fits(model, size) for entry in entries)):
        return
    infer(_sized(cls, create))
    warnings.warn(
        f"{cls.__name__} has no handler. What depends on its image size was found by building it at several sizes, as "
        "timm_resize.infer does.",
        stacklevel=2,
    )


def _teach(cls: type[nn.Module], entry: Entry, timm: bool, rows: Sequence[Row]) -> None:
    """Register a class, or one more configuration of a class that was inferred before.

    Where timm's factory builds it, sizes are recorded as for timm's own; otherwise the entries tell them.
    """
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
        f"infer: build takes too few sizes to tell: {LEAST + 1} are needed, of {len(given or SIZES)} tried. "
        f"{reasons or 'None was refused'}. Give sizes=[(H, W), ...] that it takes."
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
