"""The samples of every op through one kind of implementation, for compute-sanitizer: `python -m bench.gpu.small_cases cuda`."""

from __future__ import annotations

import sys

import torch

from sparsekern import backends
from sparsekern.ops._registry import OPS
from tests.gpu.calls import on, outcome, samples


def main(implementation: str) -> None:
    calls = 0
    for name, op in OPS.items():
        if all(known.name != implementation for known in backends.implementations(name)):
            continue
        for sample in samples(op, implementation):
            print(f"call {name}", flush=True)
            with backends.use(**{name: implementation}):
                outcome(op, on(sample, "cuda"))
            torch.cuda.synchronize()
            calls += 1
    print(f"ran {calls} calls", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
