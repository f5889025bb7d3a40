"""Calls of an op by the names of its arguments, for tests over all ops."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsekern.ops._registry import OPS

EVERYWHERE = [op for op in OPS.values() if not op.only_on_cuda]
EVERY_OP = pytest.mark.parametrize("op", EVERYWHERE, ids=lambda op: op.name)
WRITING = [op for op in OPS.values() if op.name.endswith("_")]
EVERY_WRITING_OP = pytest.mark.parametrize("op", WRITING, ids=lambda op: op.name)


def first_sample(op, place: int = 0):
    return copy.deepcopy(list(op.samples(torch.Generator().manual_seed(0)))[place])


def named(op, sample) -> dict:
    return {**dict(zip(op.signature.parameters, sample.args, strict=False)), **sample.kwargs}


def written(op, given: dict) -> list[str]:
    arguments = {argument.name: argument.alias_info for argument in op.overload._schema.arguments}
    return [name for name in given if arguments[name] is not None and arguments[name].is_write]


def floats(given: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}


def tensors_of(result) -> list[torch.Tensor]:
    """What an op or its wrapper returns, as a list."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [] if result is None else list(result.values()) if isinstance(result, dict) else list(result)
