"""Every test starts and ends with stock timm. The process that hands out the tests imports neither it nor torch."""

from __future__ import annotations

import gc

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every N-th of the selected tests alone")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a fixed fraction of what is selected: always the same tests, in the order of collection."""
    every = config.getoption("--every")
    config.hook.pytest_deselected(items=[item for number, item in enumerate(items) if number % every])
    items[:] = items[::every]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)  # the models are tiny; one thread per worker is fastest
    gc.freeze()  # what was imported, a million objects, is not searched in every resize for who holds a Parameter


@pytest.fixture(autouse=True)
def _stock_timm():
    import timm_resize
    from timm_resize.plugin.create_model import fast_init_settings

    yield
    leaked = len(fast_init_settings)
    while len(fast_init_settings):
        timm_resize.uninstall()
    assert not leaked, "the test left the plugin installed"
