"""What would fail of the tests themselves, run with `--kernels=gpu` on a GPU, and can be seen without one."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .conftest import GPU_RUNS
from .ops import strategies, test_contracts

OPS = Path(strategies.__file__).parent


@pytest.mark.parametrize("kind", GPU_RUNS)
def test_no_implementation_is_looked_for_by_the_name_of_a_run(kind):
    request, said = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: kind)), {}
    test_contracts.test_this_run_says_what_it_checked(said.__setitem__, request)
    assert said["implementation"] == kind


def test_messages_may_name_the_gpu():
    expected = [line for path in OPS.glob("test_*.py") for line in path.read_text().splitlines() if "match=" in line]
    assert len(expected) > 100 and not [line for line in expected if re.search(r"device cpu|(?<!\()\bcpu,", line)]


def test_few_kernels_are_compiled(monkeypatch):
    """Each takes Triton seconds, in the minutes of `python -m bench.gpu`."""
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    found = runpy.run_path(strategies.__file__)
    assert found["FEW_KERNELS"] and found["EXAMPLES"] <= 8
