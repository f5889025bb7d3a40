"""The sample calls of every op on a device. `python -m bench.gpu.samples cuda` makes them by that implementation, for compute-sanitizer."""

from __future__ import annotations

import sys

import torch

from sparsekern import backends
from sparsekern.ops._registry import OPS, Op, Sample


def samples(op: Op, implementation: str, device: str = "cuda") -> list[Sample]:
    """Return those samples of the op, moved to `device`, that the implementation supports."""
    known = next(known for known in backends.implementations(op.name) if known.name == implementation)
    moved = [on(sample, device) for sample in op.samples(torch.Generator().manual_seed(0))]
    return [sample for sample in moved if known.supports(*sample.args, **sample.kwargs).ok]


def on(sample: Sample, device: str) -> Sample:
    """Return the sample with its tensors copied to `device`, their strides unchanged."""

    def move(value):
        return value.clone().to(device) if isinstance(value, torch.Tensor) else value

    return Sample(tuple(map(move, sample.args)), {name: move(value) for name, value in sample.kwargs.items()})


def tensors(sample: Sample) -> list[torch.Tensor]:
    """Return the arguments that are tensors."""
    return [value for value in (*sample.args, *sample.kwargs.values()) if isinstance(value, torch.Tensor)]


def outcome(op: Op, sample: Sample) -> list[torch.Tensor]:
    """Call the op; return its results, followed by its tensor arguments as the call left them."""
    result = op.overload(*sample.args, **sample.kwargs)
    returned = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    return returned + tensors(sample)


def main(implementation: str) -> None:
    calls = 0
    for name, op in OPS.items():
        if all(known.name != implementation for known in backends.implementations(name)):
            continue
        for sample in samples(op, implementation):
            print(f"call {name}", flush=True)
            with backends.asked({name: implementation}):
                outcome(op, on(sample, "cuda"))
            torch.cuda.synchronize()
            calls += 1
    print(f"ran {calls} calls", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
