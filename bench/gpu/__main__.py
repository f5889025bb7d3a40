"""Check and measure this GPU in the minutes given: build in place, test on the device, run compute-sanitizer, then the benchmarks.

Nothing needs a network. What did not fit is named at the end. Figures go to `bench/results/<device>.json` and the table beside it, logs
to `build/gpu`; with --out both go there. Each part replaces the rows of the same name, so that the parts can run one by one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from .. import results
from ..provenance import provenance
from ..results import Row
from . import checks, device, worker
from .budget import Budget
from .measure import measure
from .run import ROOT

PARTS = ("tests", "ops", "e2e")
LOGS = ROOT / "build" / "gpu"
KEPT_BACK = 5.0  # seconds at the end for what comes after the last step
SECONDS_TO_LOAD = 60.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="may be given more than once; tests includes compute-sanitizer"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, the build included (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the figures and the logs go")
    parser.add_argument(
        "-k", dest="selection", default="", metavar="TEXT", help="only benchmarks and test files whose name has TEXT in it"
    )
    parser.add_argument("--no-build", action="store_true", help="use the extensions that are built already, if they load here")
    parser.add_argument(
        "--profile", action="store_true", help="e2e under torch's profiler: the kernels that take longest, in bench.log"
    )
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU, nothing recorded: to try this program out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.rehearse and (problem := device.problem_with_cuda()):
        print(f"bench.gpu: {problem}", file=sys.stderr)
        return 1
    if options.rehearse:
        with tempfile.TemporaryDirectory(prefix="sparsekern-rehearsal-") as folder:
            return _run(options, Path(folder), Path(folder))
    folder, logs = options.out or results.FOLDER, options.out or LOGS
    return _run(options, folder.resolve(), logs.resolve())


def _run(options: argparse.Namespace, folder: Path, logs: Path) -> int:
    """Run the parts, the cheap and important first, and record the rows of each before the next begins. Return the exit code."""
    budget = Budget(60 * options.minutes - KEPT_BACK)
    run = provenance({"device": "rehearsal"} if options.rehearse else device.description())
    parts = options.only or PARTS
    logs.mkdir(parents=True, exist_ok=True)
    for log in logs.glob("*.log"):
        log.unlink()
    found: list[Row] = []

    def record(rows: list[Row]) -> None:
        found.extend(rows)
        table = results.record(rows, folder, run)
        print(f"{len(rows)} rows in {table}, {budget.left:.0f} s left", flush=True)

    if not options.rehearse:
        if failed := checks.libraries(budget, logs / "build.log", budget.share(SECONDS_TO_LOAD), options.no_build):
            record([failed])
            return _say(found, budget)
    if "tests" in parts and not options.rehearse:
        alone = set(parts) == {"tests"}
        record(checks.tests(budget.part(0.7 if alone else 0.35), logs / "tests.log", options.selection))
        record(checks.sanitizers(budget.part(1.0 if alone else 0.25), logs / "sanitizer.log"))
    names = worker.ordered([part for part in worker.PARTS if part in parts], options.selection)
    if not names and not found:
        print(f"bench.gpu: -k {options.selection!r} selects nothing of {', '.join(parts)}", file=sys.stderr)
        return 2
    if names:
        passed_on = [f"--{name}" for name in ("rehearse", "profile") if getattr(options, name)]
        record(measure(names, budget, logs / "bench.log", passed_on))
    return _say(found, budget)


def _say(rows: list[Row], budget: Budget) -> int:
    """Print the short table that ends the output. Return 0 unless something failed; a missed goal is no failure."""
    failed = [row for row in rows if row.reached.startswith("**failed**") or row.section == checks.SECTION and row.met is False]
    print()
    for row in rows:
        if row.section != checks.SECTION:
            met = {True: "met ", False: "MISS", None: "    "}[row.met]
            goal = f" [goal {row.goal}]" if row.goal else ""
            print(f"{met} {row.what}: {row.reached.replace('**', '')}{goal}")
    checked = [row for row in rows if row.section == checks.SECTION]
    if checked:
        print(f"checks: {sum(row.met is not False for row in checked)} of {len(checked)} passed")
    for row in failed:
        print(f"FAILED {row.what}: {row.reached.replace('**', '')}")
        for test in row.details.get("failed", ())[:5]:
            print(f"    {test}")
    if budget.cut:
        print("cut, no time was left: " + "; ".join(budget.cut))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
