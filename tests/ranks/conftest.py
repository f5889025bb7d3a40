"""The processes that stand for ranks, for the whole session."""

from __future__ import annotations

import pytest
import torch

from .pool import Pool


@pytest.fixture(scope="session")
def ranks():
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def one_thread():
    """What ranks compute is compared with what this process does: bits are equal for equally many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
