"""The example models of every family, each built and redrawn once in a process."""

from __future__ import annotations

import copy
import functools

import pytest
from torch import nn

from tests.helpers.oracle import redraw_, stock
from timm_resize.core.registry import families

EXAMPLES = {name: dict(kwargs) for family in families() for name, kwargs in family.examples.items()}

HEAVY = {"mvitv2_small_cls", "nest_tiny_jx"}
"""Examples that no keyword makes small. A smaller one of the same class is in every sweep; these are marked slow."""


def example(name: str) -> nn.Module:
    """Return an example as stock builds it, redrawn, in evaluation mode; it is the caller's own."""
    return copy.deepcopy(_built(name))


@functools.cache
def _built(name: str) -> nn.Module:
    return redraw_(stock(name, **EXAMPLES[name]))


def sweep(*names: str) -> list[object]:
    """Return parameters for tests over these examples, all by default."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in names or EXAMPLES]
