"""Every test starts and ends with stock timm."""

from __future__ import annotations

import pytest
import torch

import timm_resize
from timm_resize.plugin.create_model import fast_init_settings

torch.set_num_threads(1)  # the models are tiny; one thread per worker is fastest


@pytest.fixture(autouse=True)
def _stock_timm():
    yield
    leaked = len(fast_init_settings)
    while len(fast_init_settings):
        timm_resize.uninstall()
    assert not leaked, "the test left the plugin installed"
