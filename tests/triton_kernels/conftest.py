"""Tests of what is particular to the Triton kernels. Those that run kernels need --kernels=triton (the interpreter) or a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

WITHOUT_KERNELS = {"test_tiles.py"}


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    runs_kernels = collection_path.suffix == ".py" and collection_path.name not in WITHOUT_KERNELS
    return True if runs_kernels and not config.getoption("--kernels") else None


@pytest.fixture
def few_multiprocessors(monkeypatch):
    """A device on which even a small product takes whole waves, splits the rest, and carries its sums often."""
    from sparsekern.triton_kernels import _common, _product

    monkeypatch.setattr(_product, "device_of", lambda tensor: _common.device_of(tensor)._replace(multiprocessors=2))
    monkeypatch.setattr(_product, "CHAIN", 64)
    _product.schedule.cache_clear()
    yield
    _product.schedule.cache_clear()
