from __future__ import annotations

from pathlib import Path

import pytest

from .unfinished import stopped_after_two_blocks


@pytest.fixture
def unfinished(tmp_path, monkeypatch) -> Path:
    """An output folder of a run that stopped after two of three blocks."""
    return stopped_after_two_blocks(tmp_path / "out", monkeypatch)
