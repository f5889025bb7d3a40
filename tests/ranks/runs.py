"""Runs of `prune` on the ranks of a pool, of tiny models that each rank makes for itself."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import sparsekern
import sparsekern.methods
from sparsekern.pruning.store import InFolder
from sparsekern.ranks import World
from tests.tiny import llama

TIMES = {"report.json", "report.html", "README.md"}  # hold seconds


def tokens(samples: int = 11, length: int = 12) -> torch.Tensor:
    return torch.randint(300, (samples, length), generator=torch.Generator().manual_seed(1))


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


def pruned(rank: int, method, out=None, source=None, samples: int = 11, format: str = "dense", **options):
    """The digest of the pruned model on this rank, and its report."""
    if source is None:
        model = llama(num_hidden_layers=2)
    else:
        model = sparsekern.load(source, stream=True)
    arguments = {
        "pattern": "2:4",
        "calibration": tokens(samples),
        "batch_size": 1,
        "progress": False,
        "leaves": 8,
        "format": format,
    } | options
    report = sparsekern.prune(model, method, out=out, **arguments)
    return state_digest(model) if source is None else None, json.loads(json.dumps(report.to_dict()))


class Killed(Exception):
    """Stands for the end of a process at a block."""


def killed(rank: int, at: int, method, out, **options):
    """A run that ends on all ranks in front of a block, as a killed one does: what is on disk stays."""
    from sparsekern.pruning.blockwise import loop

    original = loop.BlockLoop._prune_block

    def prune_block(run, index, linears):
        if index == at:
            raise Killed(index)
        original(run, index, linears)

    loop.BlockLoop._prune_block = prune_block
    try:
        pruned(rank, method, out, **options)
    except (Killed, RuntimeError):
        return "killed"
    finally:
        loop.BlockLoop._prune_block = original
    raise AssertionError("the run was not killed")


def killed_in_distillation(rank: int, method, options):
    """A run that ends on all ranks behind the first step of distillation, whose state is on disk."""
    from sparsekern.pruning.gradual import training_state

    def write(state, checkpoint, done, tensors, own=training_state.TrainingState._write):
        own(state, checkpoint, done, tensors)
        raise Killed(state.steps_done)

    with (
        mock.patch.object(training_state.TrainingState, "_write", write),
        mock.patch.multiple(training_state, LEAST_SECONDS=-1.0, MOST_SHARE=1e9),
    ):
        try:
            pruned(rank, method, **options)
        except (Killed, RuntimeError):
            return "killed"
    raise AssertionError("the run was not killed")


def resumed(rank: int, method, out, **options):
    return pruned(rank, method, out, resume=True, **options)


def elsewhere(rank: int, source, folder):
    """A streamed run whose `out` is another folder for each rank. Returns the error."""
    (place := Path(folder, str(rank))).mkdir()
    before = Path.cwd()
    os.chdir(place)
    try:
        pruned(rank, "wanda", "out", source)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        os.chdir(before)
    raise AssertionError("the run was not refused")


def with_options(rank: int, method, options):
    return pruned(rank, method, **options)


def killed_with_options(rank: int, method, options):
    options = dict(options)
    return killed(rank, 1, method, options.pop("out"), **options)


def traffic(rank: int):
    """What the report says of each rank, for one block whose rounding to whole panels of rows is small."""
    model = llama(num_hidden_layers=1, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    report = sparsekern.prune(model, "sparsegpt", "2:4", tokens(8), batch_size=1, progress=False)
    return [text for name, text in report.measured.items() if name.startswith("rank ")]


def resumed_text(rank: int, source: str, text: str, out):
    """Go on with a streamed run of the command line in `test_torchrun.py`."""
    options = {"tokenizer": sparsekern.load_tokenizer(source), "samples": 9, "length": 16, "batch_size": 1}
    return sparsekern.prune(
        sparsekern.load(source, stream=True), "wanda", "2:4", text, **options, out=out, resume=True, progress=False
    )


@dataclass(frozen=True)
class FailsAt(sparsekern.methods.LinearMethod):
    """A user's method with a bug on one rank."""

    rank: int = 0
    others_end: bool = True
    name = "fails"
    needs = sparsekern.methods.FeatureNorm

    def solve(self, weight, statistics, pattern):
        if World.current().rank == self.rank:
            raise ZeroDivisionError("a bug of the user's")
        while not self.others_end:
            weight.sum()
        return sparsekern.Wanda().solve(weight, statistics, pattern)


def failing(rank: int, kind: str, out, victim: int):
    """A run that fails on rank `victim` in some way. Returns the error, and whether the model is unchanged."""
    model = llama(num_hidden_layers=2)
    before = state_digest(model)
    arguments = {"pattern": "2:4", "calibration": tokens(8), "batch_size": 1, "progress": False, "out": out}
    method: object = "wanda"
    with ExitStack() as stack:
        if kind == "nan" and rank == victim:
            stack.callback(model.model.embed_tokens.register_forward_hook(lambda *_: torch.full((1, 12, 32), math.nan)).remove)
        if kind in ("method", "endless"):
            method = FailsAt(rank=victim, others_end=kind == "method")
        if kind == "disk" and rank == victim:
            stack.enter_context(mock.patch.object(InFolder, "put", side_effect=OSError(errno.ENOSPC, "no space left", "file")))
        if kind == "seed":
            arguments["seed"] = int(rank == victim)
        if kind == "data" and rank == victim:
            arguments["calibration"] = tokens(9)[1:]
        if kind == "model" and rank == victim:
            model.model.norm.weight.data[0] = 3.0
        if kind == "pattern" and rank == victim:
            arguments["pattern"] = "1:4"
        if kind == "shares":
            arguments |= {"pattern": 0.5, "allocation": "fisher", "include": "*.mlp.*" if rank == victim else None}
        if kind == "resume" and rank == victim:
            arguments["resume"] = True
        if kind == "argument" and rank == victim:
            arguments["pattern"] = "5:4"
        if kind == "version" and rank == victim:
            stack.enter_context(mock.patch.object(torch, "__version__", "0.1"))
        try:
            sparsekern.prune(model, method, **arguments)
        except Exception as error:
            return type(error).__name__, str(error), kind == "model" or state_digest(model) == before
    raise AssertionError("the run did not fail")


def warned(rank: int, method, samples: int, options=None):
    """The digest of the pruned model, and the warnings on this rank."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        digest, _ = pruned(rank, method, samples=samples, **(options or {}))
    return digest, [str(warning.message) for warning in found]


def refused(rank: int, options):
    try:
        sparsekern.prune(llama(num_hidden_layers=1), **({"method": "wanda", "calibration": tokens(2), "progress": False} | options))
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("the run was not refused")
