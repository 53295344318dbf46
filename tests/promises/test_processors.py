"""Same bits whatever the processor offers: the promise in processes of their own, under other code paths."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.same_bits import MAPS, check_maps, check_model

PATHS = {
    "avx2": {"MKL_CBWR": "AVX2", "OMP_NUM_THREADS": "2"},
    "avx512": {"MKL_CBWR": "AVX512", "OMP_NUM_THREADS": "2"},  # falls back where the processor has none
    "compatible": {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
    "plain torch": {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    "plain torch, two threads": {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SLOW = {"avx512", "plain torch, two threads", "one thread"}  # the last is in "compatible", and in this process


CASES = [
    *(pytest.param(PATHS[n], [], id=n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PATHS),
    pytest.param(PATHS["avx2"], ["model"], id="avx2, a model", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("settings", "model"), CASES)
def test_same_bits_in_a_process_of_its_own(settings, model):
    """A tensor by itself, misplaced, strided, in the graph; once also in a model and a state dict: the same bits."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("MKL_CBWR", "ATEN_CPU_CAPABILITY")}
    inherited["OMP_WAIT_POLICY"] = "PASSIVE"  # a thread that waits takes no processor from the other tests
    command = [sys.executable, "-m", "tests.helpers.same_bits", *model]
    done = subprocess.run(command, env=inherited | settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("same bits")
    assert done.stdout.split()[-1] == settings["OMP_NUM_THREADS"]


def test_same_bits_in_this_process():
    """The same, of maps and of a model, with what this processor offers."""
    check_maps()
    check_model()


def test_the_program_notices_other_bits(monkeypatch):
    """A map that multiplies a misplaced tensor by a hair more is caught: the program above can fail."""
    how, _ = MAPS["table"]

    def by_place(self, tensor):
        return tensor * (1 + 2**-52 * (tensor.data_ptr() % 64 != 0)) + 1.0

    monkeypatch.setattr(type(how), "__call__", by_place)
    monkeypatch.setattr(type(how), "differentiable", by_place)
    with pytest.raises(AssertionError, match="elements off"):
        check_maps()
