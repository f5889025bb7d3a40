"""Streamed runs under a limit of the process's own data, for `test_memory_bound.py`, which starts this as a program.

Usage: `python -m tests.pruning.memory_bound MODEL SMALL OUT BOUND SLACK`. MODEL and SMALL are folders of models, OUT is a new folder,
BOUND is the bytes that the tensors of a streamed run may take, SLACK what a run may take beside what is counted. Both are beside what the
program has before the run. The answer is a JSON object.

Each run returns freed memory to the system at once, as runs within `max_memory` do, so that the limit is one of what they hold.
"""

import json
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import sparsekern
from sparsekern._counts import groups_over, lost_zeros, nonzeros
from sparsekern.models.memory import PROGRAM, needs_of

SAMPLES, LENGTH, BATCH = 16, 32, 4
NEVER_REACHED = 10**12  # bytes: what is not needed in any case is not kept on disk either
STAGES = {"correction": "dense", "tune": sparsekern.BlockTuning(passes=2, batch_tokens=2 * BATCH * LENGTH)}


def ids() -> torch.Tensor:
    return torch.randint(96, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


def streamed(folder: Path) -> torch.nn.Module:
    return sparsekern.load(folder, device="cpu", stream=True)


def prune(model: torch.nn.Module, out: Path, method: str, limit: int | None, **options) -> None:
    given = {"out": out, "batch_size": BATCH, "max_memory": limit, "progress": False, **options}
    sparsekern.prune(model, method, "2:4", ids(), **given)


def least(model: torch.nn.Module, out: Path, **options) -> int:
    """Return the lowest `max_memory` that a run accepts."""
    limit = 1
    while True:
        try:
            prune(model, out, "sparsegpt", limit, **options)
            raise AssertionError(f"a run within {limit} bytes was not refused")
        except ValueError as error:
            found = re.search(r"^max_memory: expected at least ([\d,.]+) MB", str(error))
            needed = round(float(found[1].replace(",", "")) * 1e6)
            if needed == limit:
                raise
        if limit > 1:
            return needed
        limit = needed


@contextmanager
def limited(more: int) -> Iterator[None]:
    """Let the system refuse the process more than `more` bytes beside what it has."""
    told = Path("/proc/self/status").read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(re.search(r"VmData:\s+(\d+) kB", told)[1]) * 1024 + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def within_least(folder: Path, out: Path, slack: int, **options) -> int:
    """Prune within the lowest `max_memory`, where the system refuses more than that and `slack`. Return what is counted of tensors."""
    needed = least(streamed(folder), out / "never", **options)
    model = streamed(folder)
    outside = needs_of(model)["what is outside the blocks"]
    with limited(needed - PROGRAM - outside + slack):
        prune(model, out / "within", "sparsegpt", needed, **options)
    return needed - PROGRAM


def main() -> None:
    model, small, out, bound, slack = *map(Path, sys.argv[1:4]), *map(int, sys.argv[4:])
    threading.stack_size(1 << 19)  # what a stack may take counts as taken
    prune(streamed(small), out / "warm", "sparsegpt", NEVER_REACHED, **STAGES)  # imports, and memory that stays with the process
    opened = streamed(model)
    with limited(bound + slack):
        prune(opened, out / "streamed", "wanda", NEVER_REACHED)
    counted = within_least(model, out / "plain", slack)
    within_least(small, out / "stages", slack, **STAGES)
    weight = torch.zeros(4096, 4096, dtype=torch.bfloat16)
    with limited(slack):
        assert int(nonzeros(weight)) == int(groups_over(weight, 2, 4)) == 0 and lost_zeros(weight, weight).tolist() == [
            0,
            weight.numel(),
        ]
    try:
        with limited(bound + slack):
            prune(sparsekern.load(model, device="cpu"), out / "resident", "wanda", None)
        died = ""
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        died = f"{type(error).__name__}: {error}"
    print(json.dumps({"died": died, "counted": counted}))


if __name__ == "__main__":
    main()
