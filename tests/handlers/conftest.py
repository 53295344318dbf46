"""A family's small model, redrawn once in a module that says its NAME and SMALL, and a copy of it for each test."""

from __future__ import annotations

import copy

import pytest

from tests.helpers.oracle import redraw_, stock


@pytest.fixture(scope="module")
def base(request):
    """The module's model, at its own size; nobody changes it."""
    return redraw_(stock(request.module.NAME, **request.module.SMALL))


@pytest.fixture
def model(base):
    """A copy to change."""
    return copy.deepcopy(base)
