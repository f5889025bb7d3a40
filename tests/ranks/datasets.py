"""Runs of `prune_continually` on the ranks of a pool."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

import sparsekern
from sparsekern.pruning.blockwise import loop
from tests.tiny import llama

from .runs import Killed, state_digest


def ids_of(name: str) -> torch.Tensor:
    return torch.randint(300, (5, 12), generator=torch.Generator().manual_seed(len(name)))


def taught(
    rank: int, method: str, names: list[str], options: Mapping = MappingProxyType({}), source=None, killed_at: int | None = None
):
    """Return the digest of the model and what the report says, or "killed" by the number of the block that the run ends in front of."""
    model = llama(num_hidden_layers=2) if source is None else sparsekern.load(source, stream=True)
    original, blocks = loop.BlockLoop._prune_block, []

    def prune_block(run, index, linears):
        blocks.append(index)
        if len(blocks) - 1 == killed_at:
            raise Killed(index)
        original(run, index, linears)

    arguments = {"pattern": "2:4", "batch_size": 1, "progress": False, "leaves": 8, "evaluate": {names[0]: ids_of("held out")}}
    arguments |= dict(options)
    arguments["length"] = 12 if arguments["evaluate"] else None
    loop.BlockLoop._prune_block = prune_block
    try:
        report = sparsekern.prune_continually(model, {name: ids_of(name) for name in names}, method, **arguments)
    except (Killed, RuntimeError):
        if killed_at is None:
            raise
        return "killed"
    finally:
        loop.BlockLoop._prune_block = original
    steps = [(step.name, step.tokens, step.sparsity, step.changed, step.perplexity) for step in report.steps]
    return state_digest(model) if source is None else None, report.dense, steps
