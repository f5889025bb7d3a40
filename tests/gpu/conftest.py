"""What the tests in this folder share. They all need a CUDA device, and are deselected where there is none."""

from __future__ import annotations

import pytest
import torch

from sparsekern import backends


@pytest.fixture
def backend(request, name) -> str:
    """The implementation that serves the op `name`; skips where this build lacks it."""
    available = backends.availability(request.param)
    if not available.ok:
        pytest.skip(available.reason)
    with backends.use(**{name: request.param}):
        yield request.param


@pytest.fixture
def no_device_left_over():
    """Gives the memory that a large test has taken back."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def room(no_device_left_over):
    """`room(gibibytes)`: skips where the device has less memory free."""

    def ask(gibibytes: float) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < gibibytes * 2**30:
            pytest.skip(f"needs {gibibytes} GiB of device memory, {free / 2**30:.1f} are free")

    return ask
