"""Runs of a tiny model with an output folder, and one that stops in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsekern
from sparsekern.pruning import checkpoint
from tests.models.families import tiny_ids, tiny_model

QUIET = {"progress": False}


class Interrupted(Exception):
    pass


def run(out, *, family="llama", method="sparsegpt", ids=None, dtype=torch.float32, **arguments):
    model = tiny_model(family).to(dtype)
    report = sparsekern.prune(model, method, "2:4", tiny_ids() if ids is None else ids, out=out, **QUIET, **arguments)
    return model, report


def stopped_after_two_blocks(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return `out`, the folder of a run that stopped after two of three blocks."""

    def interrupted(self, index, result, save=checkpoint.Checkpoint.save):
        save(self, index, result)
        if index == 1:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", interrupted)
        with pytest.raises(Interrupted):
            run(out)
    return out


def interrupted_run(out, monkeypatch, *, blocks=1, **arguments):
    """Stop a run once `blocks` are on disk."""

    def interrupted(self, index, result, save=checkpoint.Checkpoint.save):
        save(self, index, result)
        if index == blocks - 1:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", interrupted)
        run(out, **arguments)
