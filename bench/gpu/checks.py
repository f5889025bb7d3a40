"""Checks before any time is taken: the build, the tests on the device, and compute-sanitizer on small cases."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsekern import backends
from sparsekern.ops._registry import OPS

from ..results import Row
from .budget import Budget
from .run import ROOT, TIMED_OUT, last_lines, run

SECTION = "checks"
AT_ONCE = 14  # test files; most of their time is Python's, on one thread
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # torch's threads would wait for a core, spinning
SECONDS_A_FILE = 150.0
SANITIZERS = {"racecheck": ("cuda",), "memcheck": ("cuda", "triton")}  # tool -> implementations it is run on
SECONDS_A_SANITIZER = 100.0
ERRORS_FOUND = 86  # the exit code that compute-sanitizer is asked for


def build(budget: Budget, log: Path) -> Row | None:
    """Build the extensions in place for this device alone, with this Python; return a row where that fails."""
    environment = {
        "SPARSEKERN_CUDA": "1",
        "SPARSEKERN_BUILD": "1",
        "TORCH_CUDA_ARCH_LIST": ".".join(map(str, torch.cuda.get_device_capability())),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # where ninja is
    }
    code = run([sys.executable, "setup.py", "build_ext", "--inplace"], log, budget.left, environment)
    if code == 0:
        return None
    why = "stopped when the time was up" if code is TIMED_OUT else last_lines(log, 1)
    return Row(SECTION, "build", f"**failed**: {why}; see {log.name}", met=False)


def libraries(budget: Budget, log: Path, seconds: float, taken_along: bool) -> Row | None:
    """Make the extensions ready; return a row where that fails. Those that were taken along are built here only if they do not load."""
    if taken_along and loads(log, seconds) is None:
        return None
    return build(budget, log) or loads(log, seconds)


LOADED = """
from sparsekern.backends.libraries import LIBRARIES
missing = [f"{name}: {library.reason}" for name, library in LIBRARIES.items() if not library.loaded]
raise SystemExit("; ".join(missing) or 0)
"""


def loads(log: Path, seconds: float) -> Row | None:
    """Load the extensions in a process of its own; return a row where one does not load, as everything would then run otherwise."""
    if run([sys.executable, "-c", LOADED], log, seconds) == 0:
        return None
    return Row(SECTION, "loading the extensions", f"**failed**: {last_lines(log, 1)}", met=False)


@dataclass(frozen=True)
class TestRun:
    """One file of tests, with `--kernels` as given."""

    __test__ = False

    path: str
    kernels: str | None

    @property
    def name(self) -> str:
        return self.path + (f" --kernels={self.kernels}" if self.kernels else "")

    def row(self, budget: Budget, folder: Path) -> Row:
        log = folder / f"{Path(self.path).stem}-{self.kernels or 'plain'}.log"
        arguments = ["-v", "--tb=short", "-p", "no:cacheprovider", *([f"--kernels={self.kernels}"] if self.kernels else [])]
        code = run([sys.executable, "-m", "pytest", self.path, *arguments], log, budget.share(SECONDS_A_FILE), ONE_THREAD)
        return as_row(self.name, code, log.read_text(errors="replace"))


def as_row(name: str, code: int | None, output: str) -> Row:
    """Return the row of a file of tests, from its exit code (None: it was stopped) and the output of `pytest -v`.

    A file that the clock stopped, without a failure so far, is neither passed nor failed.
    """
    outcomes = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", output, re.MULTILINE)
    count = {kind: sum(outcome == kind for _, outcome in outcomes) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    words = [f"{number} {kind.lower()}" for kind, number in count.items() if number] or ["nothing ran"]
    bad = [test for test, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    if code is TIMED_OUT:
        begun = re.findall(r"^(\S+::.+?) ", output, re.MULTILINE)
        words.append(f"stopped in {begun[-1]}" if begun else "stopped")
    elif code not in (0, 5) and not bad:
        words.append(f"ended with {code}: {output.strip().splitlines()[-1] if output.strip() else ''}")
    met = None if code == 5 else code == 0 if code is not TIMED_OUT else False if bad else None
    return Row(SECTION, name, ", ".join(words), met=met, details={"failed": bad, "why": _reasons(output)})


def _reasons(output: str) -> list[str]:
    """Return the first lines that say what was wrong."""
    return re.findall(r"^E   +(.+)$", output, re.MULTILINE)[:20]


def tests(budget: Budget, log: Path, selection: str = "") -> list[Row]:
    """Run what is marked `gpu`, and tests/ops with every tensor on the device: by the implementations chosen there, and without C++."""
    runs = [one for one in all_runs() if selection in one.name]
    # What takes longest starts first.
    runs.sort(key=lambda one: "contracts" not in one.path)
    folder = log.parent / "tests"
    folder.mkdir(parents=True, exist_ok=True)

    def unless_time_is_up(one: TestRun) -> Row | None:
        return one.row(budget, folder) if budget.allows(one.name, 5) else None

    for old in folder.glob("*.log"):
        old.unlink()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = [row for row in pool.map(unless_time_is_up, runs) if row]
    log.write_text("".join(f"==== {part.stem}\n{part.read_text(errors='replace')}\n" for part in sorted(folder.glob("*.log"))))
    shutil.rmtree(folder)
    return rows


def all_runs() -> list[TestRun]:
    """Return the runs of tests. Without C++, only files of ops that have a kernel in C++: the others run the same kernels either way."""
    files, on_device = (
        sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob(pattern))
        for pattern in ("ops/test_*.py", "gpu/test_*.py")
    )
    without_cpp = [path for path in files if {"cuda", "triton"} <= kinds_of(Path(path).stem.removeprefix("test_"))]
    return [
        *(TestRun(path, None) for path in on_device),
        *(TestRun(path, "gpu") for path in files),
        *(TestRun(path, "gpu-triton") for path in without_cpp),
    ]


def kinds_of(op: str) -> set[str]:
    """Return the kinds of implementations that an op has; those of all ops where a file of tests is about no op."""
    known = [name for name in OPS if name.rstrip("_") == op] or OPS
    return {implementation.name for name in known for implementation in backends.implementations(name)}


def kernel_filters(backend: str) -> list[str]:
    """Return what compute-sanitizer calls our kernels, so that torch's own are left out: a part of C++ names, the whole of Triton's."""
    if backend == "cuda":
        return ["kns=sparsekern"]
    sources = (ROOT / "sparsekern" / "triton_kernels").glob("*.py")
    names = {name for path in sources for name in re.findall(r"@triton\.jit(?:\(.*\))?\ndef (\w+)", path.read_text())}
    return [f"kne={name}" for name in sorted(names)]


def sanitizers(budget: Budget, log: Path) -> list[Row]:
    tool_path = find_sanitizer()
    if tool_path is None:
        return [Row(SECTION, "compute-sanitizer", "not run: it is neither on the path nor beside nvcc")]
    rows = []
    for tool, implementations in SANITIZERS.items():
        for implementation in implementations:
            name = f"{tool} on small cases ({implementation})"
            if implementation == "triton" and importlib.util.find_spec("triton") is None:
                continue
            if budget.allows(name, 20):
                rows.append(_sanitize(name, tool_path, tool, implementation, budget.share(SECONDS_A_SANITIZER), log))
    return rows


def find_sanitizer() -> str | None:
    beside = [Path(home) / "bin" / "compute-sanitizer" for home in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda") if home]
    return shutil.which("compute-sanitizer") or next((str(path) for path in beside if path.is_file()), None)


def _sanitize(name: str, tool_path: str, tool: str, implementation: str, seconds: float, log: Path) -> Row:
    options = ["--tool", tool, "--error-exitcode", ERRORS_FOUND, "--report-api-errors", "no", "--print-limit", 20]
    filters = [part for known in kernel_filters(implementation) for part in ("--kernel-name", known)]
    before = log.stat().st_size if log.is_file() else 0
    command = [tool_path, *options, *filters, sys.executable, "-m", "bench.gpu.samples", implementation]
    code = run(command, log, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    with open(log, errors="replace") as file:
        file.seek(before)
        output = file.read()
    return as_sanitizer_row(name, code, output)


def as_sanitizer_row(name: str, code: int | None, output: str) -> Row:
    """Return the row of a run of compute-sanitizer, from its exit code (None: it was stopped) and its output."""
    ran = re.findall(r"^ran (\d+) calls", output, re.MULTILINE)
    if "Device not supported" in output:
        return Row(SECTION, name, "not run: compute-sanitizer refuses this device")
    if code is TIMED_OUT:
        done = len(re.findall(r"^call ", output, re.MULTILINE))
        return Row(
            SECTION, name, f"stopped after {done} calls, nothing found until then" if done else "stopped before the first call"
        )
    if code == 0 and ran:
        return Row(SECTION, name, f"{ran[-1]} calls, nothing found", met=True)
    found = re.findall(r"ERROR SUMMARY: (\d+)|RACECHECK SUMMARY: (\d+)", output)
    what = f"{max(map(int, filter(None, found[-1])))} errors" if found else f"ended with {code}"
    return Row(SECTION, name, f"**failed**: {what}", met=False, details={"output": output[-4000:]})
