"""What may import what among the package, its baselines, its benchmarks and its tests, and what of it is shipped."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "sparsekern": {"baselines", "bench", "tests"},
    "baselines": {"sparsekern", "bench", "tests"},
    "bench": {"tests"},
}


def imported(file: Path) -> set[str]:
    """Return the top-level names that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_nothing_imports_from_above(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    offenders = {file.relative_to(ROOT).as_posix(): found for file in files if (found := imported(file) & FORBIDDEN[folder])}
    assert not offenders


def test_imports_are_found_inside_functions_too(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("from . import near\ndef f():\n    import tests.tiny\n    from baselines import plain\n")
    assert imported(file) == {"tests", "baselines"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in the standard library from Python 3.11 on")
def test_only_the_package_is_shipped():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {name.partition(".")[0] for name in find_packages(str(ROOT), **settings)} == {"sparsekern"}
    assert {"baselines", "bench", "tests"} <= set(find_packages(str(ROOT)))  # which the settings leave out
