"""Runs of `prune` on the ranks of a pool, of tiny models that each rank makes for itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

import sparsekern
from tests.tiny import llama

TIMES = {"report.json", "report.html", "README.md"}  # hold seconds


def tokens(samples: int = 11, length: int = 12) -> torch.Tensor:
    return torch.randint(320, (samples, length), generator=torch.Generator().manual_seed(1))


def digests(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name not in TIMES
    }


def state_digest(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pruned(rank: int, method, out=None, source=None, samples: int = 11, **options):
    """The digest of the pruned model on this rank, and its report."""
    if source is None:
        model = llama(num_hidden_layers=2)
    else:
        model = sparsekern.load(source, stream=True)
    arguments = {"pattern": "2:4", "calibration": tokens(samples), "batch_size": 1, "progress": False, "leaves": 8} | options
    report = sparsekern.prune(model, method, out=out, **arguments)
    return state_digest(model) if source is None else None, json.loads(json.dumps(report.to_dict()))
