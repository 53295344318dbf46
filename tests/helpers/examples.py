"""The example models of every family, each built and redrawn once in a process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable

import pytest
from torch import nn

from tests.helpers.oracle import redraw_, stock
from timm_resize.core.registry import families

EXAMPLES = {name: dict(kwargs) for family in families() for name, kwargs in family.examples.items()}

HEAVY = {"mvitv2_small_cls", "nest_tiny_jx"}
"""Examples that no keyword makes small."""

ALWAYS = {next(iter(family.examples)) for family in families() if family.examples} | {
    "botnet26t_256",
    "lambda_resnet26rpt_256",
    "maxvit_pico_rw_256",
    "resmlp_12_224",
    "resnet50_clip",
    "vit_small_patch16_rope_ape_224",
    "vit_tiny_r_s16_p8_224",
}
"""The first example of every family, and those with layers that it has not, for every default run; the others are slow,
and CI runs a part of them."""


def example(name: str) -> nn.Module:
    """Return an example as stock builds it, redrawn, in evaluation mode; it is the caller's own."""
    return copy.deepcopy(_built(name))


@functools.cache
def _built(name: str) -> nn.Module:
    return redraw_(stock(name, **EXAMPLES[name]))


def sweep(*names: str, turn: int = 0, of: int = 1) -> list[object]:
    """Return parameters for tests over these examples, all if none is given.

    Promises that one mechanism keeps for every family take turns: by default each has every `of`-th of `ALWAYS`.
    """
    taken = {name for at, name in enumerate(n for n in names or EXAMPLES if n in ALWAYS) if at % of == turn}
    return mostly_slow(names or EXAMPLES, *taken)


def mostly_slow(names: Iterable[str], *default: str) -> list[object]:
    """Return parameters of which all but the default ones are slow."""
    return [n if n in default else pytest.param(n, marks=pytest.mark.slow) for n in names]


def each_with(value: object, names: list[object]) -> list[object]:
    """Return parameters of two, each of the names and the value, slow where the name is."""
    both = ((*n.values, value) if hasattr(n, "values") else (n, value) for n in names)
    marks = (getattr(n, "marks", ()) for n in names)
    return [pytest.param(*pair, marks=mark) for pair, mark in zip(both, marks, strict=True)]


def as_built(name: str) -> dict[str, object]:
    """Return options with which a resize does what building, or loading, at the size does in stock timm."""
    if "swin" in name and "swinv2_cr" not in name:
        return {"window_policy": "keep"}
    return {"interpolation": "bilinear", "antialias": False} if "flexi" in name else {}
