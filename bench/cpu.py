"""Everything that is measured on a CPU, in one command: `python -m bench.cpu`, which is what `make bench` runs.

* `ops`: each op against its baselines, under pytest-benchmark.
* `prune`: SmolLM2-135M by ours and by llm-compressor, where LLMCOMPRESSOR_PYTHON names an environment that has it.
* `quality`: perplexity after pruning, where `--wikitext` names a folder.
* `packed`: size and speed of packed models.

Figures go to `bench/results/<CPU model>-cpu.json`, with a table beside it. Rows that are not measured this time are kept with their own
date, commit and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import results
from .results import Row

ROOT = Path(__file__).parent.parent
PARTS = ("ops", "prune", "quality", "packed")


def run_ops(pytest_arguments: list[str]) -> list[Row]:
    """Run the benchmarks of ops and return a row for each that was timed against a baseline.

    Raises:
        SystemExit: A benchmark's assertion failed; nothing is recorded then.
    """
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        file = Path(folder) / "benchmarks.json"
        paths = [] if any(argument.startswith("bench/") for argument in pytest_arguments) else ["bench/ops"]
        command = [sys.executable, "-m", "pytest", "-q", f"--benchmark-json={file}", *paths, *pytest_arguments]
        if code := subprocess.run(command, cwd=ROOT).returncode:
            raise SystemExit(code)
        taken = json.loads(file.read_text())["benchmarks"]
    return [_row(benchmark) for benchmark in taken if "ratio" in benchmark["extra_info"]]


def _row(benchmark: dict) -> Row:
    extra, median = benchmark["extra_info"], benchmark["stats"]["median"]
    goal, ratio = extra["goal"], extra["ratio"]
    shares = [f"{share:.0%} of {name.removeprefix('share_of_')}" for name, share in extra.items() if name.startswith("share_of_")]
    shares += [f"{share:.0%} of the dense {name}" for name, share in extra.get("of_dense", {}).items()]
    return Row(
        "ops",
        benchmark["group"],
        f"{ratio:.2f}x ({', '.join([results.seconds(median), *shares])})",
        f"{extra['baseline']} {results.seconds(extra['baseline_seconds'])}",
        _goal(goal, extra),
        ratio >= goal if goal else None,
        {"seconds": median, "rounds": benchmark["stats"]["rounds"], **extra},
    )


def _goal(goal: float | None, extra: dict) -> str:
    if goal is None:
        return ""
    ceiling = extra.get("ratio_at_ceiling", goal)
    return f">= {goal}x" if ceiling >= goal else f">= {goal}x (at the ceiling it would be {ceiling:.1f}x)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="may be given more than once")
    parser.add_argument("--llmcompressor", default=os.environ.get("LLMCOMPRESSOR_PYTHON"), metavar="PYTHON")
    parser.add_argument("--wikitext", type=Path, metavar="FOLDER", help="with valid.txt and test.txt of WikiText-2")
    parser.add_argument("--rehearse", action="store_true", help="the benchmarks of ops with toy sizes; nothing is recorded")
    arguments, pytest_arguments = parser.parse_known_args()
    if arguments.rehearse:
        print(results.as_table("rehearsal", run_ops(["--rehearse", *pytest_arguments])))
        return
    parts, run = arguments.only or PARTS, results.this_run()
    if "ops" in parts:
        results.record(run_ops(pytest_arguments), run=run)
    if "prune" in parts:
        if arguments.llmcompressor:
            from . import bench_prune

            results.record(bench_prune.compare(arguments.llmcompressor), run=run)
        else:
            print("prune: not measured, LLMCOMPRESSOR_PYTHON is not set")
    if "quality" in parts:
        if arguments.wikitext:
            from . import quality

            results.record(quality.run(arguments.wikitext, list(quality.TARGETS)), run=run)
        else:
            print("quality: not measured, --wikitext was not given")
    if "packed" in parts:
        command = [sys.executable, "-m", "bench.bench_packed"]
        subprocess.run([*command, *(["--wikitext", str(arguments.wikitext)] if arguments.wikitext else [])], cwd=ROOT, check=True)
    print(results.record([], run=run).read_text())


if __name__ == "__main__":
    main()
