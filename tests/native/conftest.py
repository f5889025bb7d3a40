"""Fixtures that several files of native tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import sanitizers


@pytest.fixture(scope="session")
def sanitized_python(tmp_path_factory) -> Iterator[sanitizers.Interpreter]:
    """A Python with the sanitizers' libraries and torch in it, which runs each program in a fork of its own."""
    with sanitizers.Interpreter(tmp_path_factory.mktemp("sanitized_python")) as interpreter:
        yield interpreter
