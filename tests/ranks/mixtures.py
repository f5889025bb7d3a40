"""Runs of mixtures on the ranks of a pool."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from unittest import mock

import torch

import sparsekern
from sparsekern.pruning.blockwise import experts, loop
from sparsekern.pruning.blockwise.shelf import Shelf

from .runs import state_digest


def pruned(
    rank: int, folder: str, method, out=None, options: Mapping = MappingProxyType({}), stream: bool = False, words: int = 300
):
    """Return the digest of the pruned model on this rank, None if it is streamed, and the zeros and error of each layer."""
    model = sparsekern.load(folder, stream=stream)
    ids = torch.randint(words, (12, 20), generator=torch.Generator().manual_seed(1))
    arguments = {"pattern": "2:4", "calibration": ids, "batch_size": 1, "progress": False, "leaves": 8} | dict(options)
    report = sparsekern.prune(model, method, out=out, **arguments)
    layers = [(layer.name, layer.pattern, layer.zeros, layer.error) for layer in report.layers]
    return None if stream else state_digest(model), layers


def removed(rank: int, folder: str, method, out=None, options: Mapping = MappingProxyType({}), stream: bool = False):
    """Return the digest of the smaller model on this rank, the scores and removed experts of each layer, and the report of `then`.

    The digest of a streamed model is that of its logits.
    """
    model = sparsekern.load(folder, stream=stream)
    ids = torch.randint(300, (12, 20), generator=torch.Generator().manual_seed(1))
    arguments = {"calibration": ids, "batch_size": 1, "progress": False, "leaves": 8} | dict(options)
    report = sparsekern.prune(model, method, out=out, **arguments)
    layers = [(layer.name, layer.scores, layer.tokens, layer.removed) for layer in report.layers]
    after = [(layer.name, layer.zeros, layer.error) for layer in report.then.layers] if report.then else []
    return logits_digest(model, ids) if stream else state_digest(model), layers, after, report.resumed_blocks


def logits_digest(model, ids: torch.Tensor) -> str:
    with torch.no_grad():
        return hashlib.sha256(model(ids[:1]).logits.numpy().tobytes()).hexdigest()


def pruned_with_unequal_memory(rank: int, folder: str, method, out, options: Mapping = MappingProxyType({})):
    """A run of which the second rank has memory for a single expert, as of a smaller GPU."""
    with mock.patch.object(loop, "expert_bytes", lambda device, limit=None: 1 if rank == 1 else experts.EXPERT_BYTES):
        return pruned(rank, folder, method, out, options)


def shelves(rank: int, folder: str, out):
    """Return the folders that a limited run of a streamed model keeps hidden states in, for which it has a limit."""
    found, make = [], Shelf.__init__

    def made(self, limit=None, place=None, *more):
        if limit is not None:
            found.append(str(place))
        make(self, limit, place, *more)

    with mock.patch.object(Shelf, "__init__", made):
        pruned(rank, folder, "wanda", out, {"max_memory": "8GB"}, stream=True)
    return found
