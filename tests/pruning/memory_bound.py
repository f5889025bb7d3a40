"""Streamed runs under a limit of the process's own data, for `test_memory_bound.py`, which starts this as a program.

Usage: `python -m tests.pruning.memory_bound MODEL SMALL OUT BOUND SLACK`. MODEL and SMALL are folders of models, OUT is a new folder,
BOUND is the bytes that a streamed run may take beside what the program has before it, SLACK what a run may take beside what `max_memory`
counts. The answer is a JSON object.
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
from sparsekern.models.memory import PROGRAM, needs_of

SAMPLES, LENGTH, BATCH = 16, 32, 4


def ids() -> torch.Tensor:
    return torch.randint(96, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


def pruned(folder: Path, out: Path, method: str, limit: int | None = None, *, stream: bool = True):
    model = sparsekern.load(folder, device="cpu", stream=stream)
    sparsekern.prune(model, method, "2:4", ids(), out=out, batch_size=BATCH, max_memory=limit, progress=False)


def least(folder: Path, out: Path) -> int:
    """Return the lowest `max_memory` that a run accepts."""
    limit = 1
    while True:
        try:
            pruned(folder, out, "sparsegpt", limit)
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


def main() -> None:
    model, small, out, bound, slack = *map(Path, sys.argv[1:4]), *map(int, sys.argv[4:])
    threading.stack_size(1 << 20)  # what a stack may take counts as taken
    pruned(small, out / "warm", "sparsegpt")  # imports, and memory that stays with the process
    with limited(bound):
        pruned(model, out / "streamed", "wanda")
    needed = least(model, out / "never")
    outside = needs_of(sparsekern.load(model, device="cpu", stream=True))["what is outside the blocks"]
    with limited(needed - PROGRAM - outside + slack):
        pruned(model, out / "limited", "sparsegpt", needed)
    try:
        with limited(bound):
            pruned(model, out / "resident", "wanda", stream=False)
        died = ""
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        died = f"{type(error).__name__}: {error}"
    print(json.dumps({"died": died, "counted": needed - PROGRAM}))


if __name__ == "__main__":
    main()
