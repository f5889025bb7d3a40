"""The processes that stand for ranks, for the whole session."""

from __future__ import annotations

import pytest

from .pool import Pool


@pytest.fixture(scope="session")
def ranks():
    pool = Pool(4)
    yield pool
    pool.close()
