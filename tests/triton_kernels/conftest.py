"""Tests of what is particular to the Triton kernels. Those that run kernels need --kernels=triton (the interpreter) or a GPU."""

from __future__ import annotations

from pathlib import Path

WITHOUT_KERNELS = {"test_tiles.py"}


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    runs_kernels = collection_path.suffix == ".py" and collection_path.name not in WITHOUT_KERNELS
    return True if runs_kernels and not config.getoption("--kernels") else None
