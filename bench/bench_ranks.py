"""`prune` of SmolLM2-135M by two processes of one thread against one process of one thread: `python -m bench.bench_ranks`.

Both sides sum in 8 leaves, so that their weights have the same bits, which is asserted first. `torchrun` starts new processes for each run; rounds
take turns. The whole `prune` call is timed, without loading. Run it on a quiet machine with at least two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sparsekern.data import calibration_ids

from . import results, smollm2
from .results import Row

TEXT = "builtin:python-docs"
SECTION = "prune by several processes"
FASTER = 1.8
SAMPLES = 64
ROUNDS = {"sparsegpt": 2, "alps": 1}  # by method; ALPS takes six times as long, and all ends within ten minutes
SIDES = (1, 2)


def run_once(work: Path, method: str, processes: int) -> dict[str, Any]:
    """Return what `bench.ranks_worker` writes of one run by so many processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*start, "-m", "bench.ranks_worker", smollm2.MODEL, str(work / "ids.safetensors"), str(work / "result.json"), method]
    subprocess.run(command, cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return json.loads((work / "result.json").read_text())


def row_of(method: str, what: str, found: dict[int, list[dict[str, Any]]]) -> Row:
    """Return the row for the runs of each number of processes."""
    seconds = {size: [run["seconds"] for run in runs] for size, runs in found.items()}
    one, two = (statistics.median(seconds[size]) for size in SIDES)
    return Row(
        SECTION,
        f"{what}, {method} 2:4: two processes against one",
        f"{one / two:.2f}x ({results.seconds(two)})",
        f"one process {results.seconds(one)}",
        f">= {FASTER}x",
        one / two >= FASTER,
        {
            "seconds": seconds[2],
            "one_process_seconds": seconds[1],
            "phases": {size: runs[-1]["phases"] for size, runs in found.items()},
            "ranks": found[2][-1]["ranks"],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help=f"of each method; {ROUNDS}")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--method", action="append", choices=tuple(ROUNDS))
    parser.add_argument("--rehearse", action="store_true", help="print the rows, and record nothing")
    arguments = parser.parse_args()
    run = results.this_run()
    what = f"SmolLM2-135M, {arguments.samples} x {smollm2.LENGTH} tokens"
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        work = Path(folder)
        ids = calibration_ids(TEXT, smollm2.tokenizer(), samples=arguments.samples, length=smollm2.LENGTH)
        save_file({"ids": ids}, work / "ids.safetensors")
        for method in arguments.method or ROUNDS:
            found: dict[int, list[dict[str, Any]]] = {size: [] for size in SIDES}
            for _ in range(arguments.rounds or ROUNDS[method]):
                for size in SIDES:
                    found[size].append(run_once(work, method, size))
                    print(method, size, found[size][-1], flush=True)
            digests = {result["digest"] for runs in found.values() for result in runs}
            assert len(digests) == 1, f"{method}: one process and two give other weights"
            row = row_of(method, what, found)
            print(row, flush=True)
            if not arguments.rehearse:
                results.record([row], run=run)


if __name__ == "__main__":
    main()
