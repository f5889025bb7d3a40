"""Run the benchmarks in worker processes: one that crashes or hangs costs its own row and a restart."""

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
    """Return the rows of the benchmarks `names`, in their order, as far as time allows; `budget.cut` gets the others.

    When a worker ends early, those that did not seem to fit have another chance. `options` are the worker's.
    """
    rows: list[Row] = []
    waiting = list(names)
    while chosen := _affordable(waiting, budget):
        with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
            file = Path(folder) / "rows.jsonl"
            file.touch()
            ended = _run_worker(chosen, file, budget, log, options)
            found, running = _read(file)
        rows += found
        if running is not None:
            rows.append(Row(SECTION, running, f"**failed**: {ended}; see {log.name}", met=False))
            if running not in chosen:  # the ceilings: nothing else will go better
                return rows
            chosen = chosen[: chosen.index(running) + 1]
        waiting = [name for name in waiting if name not in chosen]
    budget.cut += waiting
    return rows


def _affordable(names: list[str], budget: Budget) -> list[str]:
    """Return those that are likely to fit in the time left, in order; a long one does not displace a shorter one after it."""
    left, kept = budget.left - SECONDS_TO_START, []
    for name in names:
        if worker.likely_seconds(name) <= left:
            left -= worker.likely_seconds(name)
            kept.append(name)
    return kept


def _run_worker(names: Sequence[str], file: Path, budget: Budget, log: Path, options: Sequence[str]) -> str:
    """Run a worker until it ends, hangs or the time is up. Return how it ended, in words."""
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
    """Return the rows of a worker, and the benchmark that it was at when it ended: None if it finished."""
    rows, running = [], "the start of the process"
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        if "row" in entry:
            rows.append(Row(**entry["row"]))
        else:
            running = entry["start"]
    return rows, running
