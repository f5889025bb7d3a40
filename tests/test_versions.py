"""The minimum versions that pyproject.toml states are those that every other file states, and the syntax is that of the minimum Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
PYTHON = re.search(r'requires-python = ">=([\d.]+)"', PROJECT)[1]
TORCH, TRANSFORMERS = (re.search(rf'"{name}>=([\d.]+)"', PROJECT)[1] for name in ("torch", "transformers"))
PARTS = tuple(map(int, PYTHON.split(".")))


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("README.md", f"with Python {PYTHON} or later"),
        ("README.md", f"has torch {TORCH} or later"),
        ("docs/install.md", f"needs Python {PYTHON} or later, torch {TORCH} or later and transformers {TRANSFORMERS} or later"),
        ("Makefile", f"sys.version_info < ({', '.join(map(str, PARTS))})"),
        ("Makefile", f"sparsekern needs Python {PYTHON} or later"),
        ("tools/build_backend.py", f'"torch>={TORCH}"'),
        ("pyproject.toml", f'python_version = "{PYTHON}"'),
        ("pyproject.toml", f'target-version = "py{PYTHON.replace(".", "")}"'),
        ("CONTRIBUTING.md", f"PYTHON=python{PYTHON} TORCH='torch=={TORCH}.0 transformers=={TRANSFORMERS}.0'"),
    ],
)
def test_every_file_states_the_same_minimum(file, statement):
    assert statement in (ROOT / file).read_text()


@pytest.mark.parametrize("folder", ["sparsekern", "tools", "bench", "examples"])
def test_the_syntax_is_that_of_the_minimum_python(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        ast.parse(file.read_text(), str(file), feature_version=PARTS)


def test_newer_syntax_would_be_found():
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    pass\nexcept* ValueError:\n    pass", feature_version=PARTS)
