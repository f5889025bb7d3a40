"""Running the op tests in a process of their own, on kernels that are built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import sparsekern

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"  # kept: what has not changed is not compiled again
# Tracing runs no kernel that the plain calls do not run.
NOT_AGAIN = "not opcheck and not compile"


def compiler() -> list[str]:
    return os.environ.get("CXX", "c++").split()


def runtime_libraries() -> str:
    """What must be loaded before Python for a sanitized library to work in it."""
    paths = [
        subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip(f"{compiler()[0]} comes without sanitizer libraries")
    return " ".join(paths)


def copy_package(folder: Path) -> Path:
    """A copy of the package and its tests without any compiled library."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(sparsekern.__file__).parent, folder / "sparsekern", ignore=ignore)
    # An editable install would find its own library for this copy; a library that is put here comes before this file.
    (folder / "sparsekern" / "_C.py").write_text('raise ImportError("this copy of the package has no compiled kernels")\n')
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime_libraries(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
        **environment,
    }
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True)


def run_op_tests(
    folder: Path, *arguments: str, tests: Sequence[str] = ("tests/ops",), **environment: str
) -> subprocess.CompletedProcess:
    """All of `tests` but what only traces and what is slow."""
    selection = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "-k", NOT_AGAIN]
    return run(folder, "-m", "pytest", *tests, *selection, *arguments, **environment)
