"""Runs the benchmarks in worker processes: what crashes or hangs costs its own row and a restart."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..results import Row
from . import worker
from .budget import Budget
from .run import ROOT, last_lines, stop

SECONDS_TO_START = 12.0  # a process: imports, the device's context, the ceilings
SECONDS_WITHOUT_A_WORD = 100.0  # after which a benchmark is taken to hang
SECTION = "ops"


def measure(names: list[str], budget: Budget, log: Path, options: Sequence[str] = ()) -> list[Row]:
    """The rows of the benchmarks `names`, in their order, as far as time allows; `budget.cut` gets the others.

    `options` are the worker's.
    """
    rows: list[Row] = []
    while names := _affordable(names, budget):
        with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
            file = Path(folder) / "rows.jsonl"
            file.touch()
            ended = _run_worker(names, file, budget, log, options)
            found, running = _read(file)
        rows += found
        if running is None:
            break
        rows.append(Row(SECTION, running, f"**failed**: {ended}; see {log.name}", met=False))
        if running not in names:  # the ceilings: nothing else will go better
            break
        names = names[names.index(running) + 1 :]
    return rows


def _affordable(names: list[str], budget: Budget) -> list[str]:
    """Those that fit in what is left, in order. One that is cut does not keep a shorter one from its place."""
    left, kept = budget.left - SECONDS_TO_START, []
    for name in names:
        if worker.likely_seconds(name) <= left:
            left -= worker.likely_seconds(name)
            kept.append(name)
        else:
            budget.cut.append(name)
    return kept


def _run_worker(names: Sequence[str], file: Path, budget: Budget, log: Path, options: Sequence[str]) -> str:
    """Waits for a worker; how it ended, in words, if it did not get to its end."""
    command = [sys.executable, "-m", "bench.gpu.worker", *options, "--", str(file), *names]
    with open(log, "a") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        heard, size = time.monotonic(), 0
        while process.poll() is None:
            time.sleep(0.1)
            if file.stat().st_size != size:
                heard, size = time.monotonic(), file.stat().st_size
            quiet = time.monotonic() - heard
            if quiet > SECONDS_WITHOUT_A_WORD or not budget.left:
                stop(process)
                return f"stopped after {quiet:.0f} s" + ("" if budget.left else ", when the time was up")
    return f"the process ended with {process.returncode}: {last_lines(log, 1)[:300]}"


def _read(file: Path) -> tuple[list[Row], str | None]:
    """The rows of a worker and the benchmark that it was at when it ended, None at its end."""
    rows, running = [], "the start of the process"
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        if "row" in entry:
            rows.append(Row(**entry["row"]))
        else:
            running = entry["start"]
    return rows, running
