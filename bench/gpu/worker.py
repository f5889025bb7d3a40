"""Run benchmarks in a process of their own: `python -m bench.gpu.worker FILE NAME...`.

FILE receives a line of JSON for each row as soon as it is known, and one before each benchmark starts. A kernel that crashes or hangs
takes only this process with it; `bench.gpu.measure` sees which benchmark it was and continues with the next.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from ..ops import all_cases
from ..results import Row
from . import cases, e2e
from .crossing import SWEEPS
from .device import Ceilings, give_memory_back, measure_ceilings
from .rows import DeviceCase, DevicePlace

FIRST = ("obs_sweep", "gram_")  # ops whose times decide how long `prune` takes


def is_headline(case: DeviceCase) -> bool:
    """Return whether a case is measured before whole models are."""
    return case.case.op in FIRST and case.has_goal


def _by_importance() -> list[DeviceCase]:
    """Return the cases of a GPU: those of `FIRST` with a goal, then the others of `FIRST`, then those with a goal, then the rest."""
    found = [DeviceCase(case) for module in (*all_cases().values(), cases.CASES) for case in module if case.cuda is not None]
    return sorted(
        found, key=lambda each: (not is_headline(each), each.case.op not in FIRST, each.case.op != FIRST[0], not each.has_goal)
    )


CASES = tuple(_by_importance())
HEADLINES = sum(map(is_headline, CASES))
KNOWN = (*CASES[:HEADLINES], *e2e.RUNS, *CASES[HEADLINES:], *SWEEPS)
PARTS = {"ops": (*CASES, *SWEEPS), "e2e": e2e.RUNS}


def ordered(parts: Collection[str] = tuple(PARTS), selection: str = "") -> list[str]:
    """Return the names that have `selection` in them, the most important first: headline ops, whole models, then the other ops."""
    wanted = {known.name for part in parts for known in PARTS[part] if selection in known.name}
    return [known.name for known in KNOWN if known.name in wanted]


def likely_seconds(name: str) -> float:
    return next(known.likely_seconds for known in KNOWN if known.name == name)


def ceiling_rows(ceilings: Ceilings) -> Iterator[Row]:
    details = {"copy_bytes_a_second": ceilings.copy, "bf16_flops_a_second": ceilings.bf16, "fp32_flops_a_second": ceilings.fp32}
    yield Row("ceilings", "copy on the device, read and written", f"{ceilings.copy / 1e12:.2f} TB/s", details=details)
    yield Row("ceilings", "matrix product of 8192, bf16", f"{ceilings.bf16 / 1e12:.0f} TFLOP/s")
    yield Row("ceilings", "matrix product of 8192, fp32", f"{ceilings.fp32 / 1e12:.1f} TFLOP/s")


def run(name: str, place: DevicePlace) -> Iterator[Row]:
    for known in KNOWN:
        if known.name == name:
            yield from known.rows(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="+", choices=ordered(), metavar="NAME")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    with open(arguments.file, "a", buffering=1) as file:

        def tell(**entry: object) -> None:
            print(json.dumps(entry), file=file)

        def tell_row(row: Row) -> None:
            tell(row=asdict(row))
            print(f"{row.what}: {row.reached}", flush=True)

        tell(start="ceilings")
        ceilings = measure_ceilings(device, small=arguments.rehearse)
        for row in ceiling_rows(ceilings):
            tell_row(row)
        place = DevicePlace(device, arguments.rehearse, ceilings=ceilings, profile=arguments.profile)
        for name in arguments.names:
            tell(start=name)
            for row in run(name, place):
                tell_row(row)
            give_memory_back(device)
        tell(start=None)


if __name__ == "__main__":
    main()
