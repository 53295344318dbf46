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


def sweep(*names: str) -> list[object]:
    """Return parameters for tests over these examples, all by default."""
    return [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in names or EXAMPLES]
