"""Calls of every op on a CUDA device: the samples that the ops bring, by op and implementation."""

from __future__ import annotations

import pytest
import torch

from sparsekern import backends
from sparsekern.ops._registry import OPS, Op, Sample

DEVICE = "cuda"
# Those that neither have an output whose size depends on values nor choose what to do next by a value.
CAPTURABLE = (
    "bitmask_linear",
    "bitmask_unpack",
    "cross_gram_",
    "feature_norm_",
    "gated_split",
    "gram_",
    "gram_symmetrize_",
    "head_neuron_scores",
    "nm_linear",
    "nm_mask",
    "nm_pack",
    "nm_prune_pack",
    "nm_unpack",
    "obs_sweep",
    "plain_split",
    "sensitivity_",
    "topk_mask",
)

IMPLEMENTED = [(op, known.name) for op in OPS for known in backends.implementations(op)]
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("name", "backend"), IMPLEMENTED, ids=lambda value: value, indirect=["backend"])
EVERY_CAPTURABLE = pytest.mark.parametrize(
    ("name", "backend"), [known for known in IMPLEMENTED if known[0] in CAPTURABLE], ids=lambda value: value, indirect=["backend"]
)


def samples(op: Op, backend: str, device: str = DEVICE) -> list[Sample]:
    """The op's samples on `device`, as far as the implementation supports them."""
    implementation = next(known for known in backends.implementations(op.name) if known.name == backend)
    moved = [on(sample, device) for sample in op.samples(torch.Generator().manual_seed(0))]
    return [sample for sample in moved if implementation.supports(*sample.args, **sample.kwargs).ok]


def on(sample: Sample, device: str) -> Sample:
    """The same values in memory of their own, as far apart as they were."""

    def move(value):
        return value.clone().to(device) if isinstance(value, torch.Tensor) else value

    return Sample(tuple(map(move, sample.args)), {name: move(value) for name, value in sample.kwargs.items()})


def tensors(sample: Sample) -> list[torch.Tensor]:
    return [value for value in (*sample.args, *sample.kwargs.values()) if isinstance(value, torch.Tensor)]


def outcome(op: Op, sample: Sample) -> list[torch.Tensor]:
    """What the op returns, then what it was given, as it is after the call."""
    result = op.overload(*sample.args, **sample.kwargs)
    returned = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    return returned + tensors(sample)
