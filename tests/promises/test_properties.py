"""Random sequences of steps on random models: what must hold, holds after each."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.examples import EXAMPLES, HEAVY
from tests.helpers.steps import STEPS, Sequence


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_sequences(count):
    """Identity, shapes and finite outputs after every step; after a resize the bits of before, and stock's outputs."""

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        name=st.sampled_from(sorted(EXAMPLES.keys() - HEAVY)),
        steps=st.lists(st.sampled_from(STEPS), min_size=3, max_size=8),
        seed=st.integers(0, 2**16),
    )
    def run(name, steps, seed):
        sequence = Sequence(name, seed)
        for step in steps:
            sequence.run(step)
        assert sum(sequence.counts[s] for s in STEPS) == len(steps)

    run()
