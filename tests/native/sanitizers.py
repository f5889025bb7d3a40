"""Processes of their own for kernels that are built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import json
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
# Versions, gradients and autocast are the dispatcher's, whatever kernel runs below it.
DISPATCHER = "tests/ops/test_torch_op.py"


def compiler() -> list[str]:
    return os.environ.get("CXX", "c++").split()


def runtime_libraries() -> str:
    """Return what must be loaded before Python for a sanitized library to work in it."""
    paths = [
        subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip(f"{compiler()[0]} comes without sanitizer libraries")
    return " ".join(paths)


def copy_package(folder: Path) -> Path:
    """Copy the package and its tests without any compiled library."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(sparsekern.__file__).parent, folder / "sparsekern", ignore=ignore)
    # An editable install would find its own library for this copy; a library that is put here comes before this file.
    (folder / "sparsekern" / "_C.py").write_text('raise ImportError("this copy of the package has no compiled kernels")\n')
    for part in ("tests", "baselines"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def environment_of(folder: Path) -> dict[str, str]:
    """Return the environment of a sanitized Python that imports from a folder."""
    return {
        **os.environ,
        "LD_PRELOAD": runtime_libraries(),
        # Python itself leaks at exit. An allocation that is too large is torch's error, as it is without the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
    }


# Forks before it knows the program, so that `import torch`, the slowest part of each, is done once.
SERVER = """
import json, os, sys, traceback, torch

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        sys.path.insert(0, job["folder"])
        status = 1
        try:
            exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Interpreter:
    """A sanitized Python that has imported torch, and runs each program in a fork of itself.

    Args:
        folder: an empty folder for what programs write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder,
            env=environment_of(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, folder: Path, program: str, **environment: str) -> subprocess.CompletedProcess:
        """Run a program in a folder, whose packages come first, as `python -c` would run it."""
        job = {"folder": str(folder), "program": program, "environment": environment}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        out, err = ((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess("<program>", status, out, err)


def run_op_tests(
    folder: Path, *arguments: str, tests: Sequence[str] = ("tests/ops",), **environment: str
) -> subprocess.CompletedProcess:
    """Run `tests`, except those that only trace, those of torch's dispatcher and those that are slow."""
    selection = [f"--ignore={DISPATCHER}", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "-k", NOT_AGAIN]
    command = [sys.executable, "-m", "pytest", *tests, *selection, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment_of(folder) | environment, capture_output=True, text=True)
