"""Corrected and tuned runs of streamed models: the bits of a model in memory, also after a kill, within the memory that is counted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsekern
from sparsekern import BlockTuning
from sparsekern.models.streaming import in_memory
from sparsekern.pruning import memory
from sparsekern.pruning.blockwise import tuned
from sparsekern.pruning.blockwise.loop import BlockLoop
from sparsekern.pruning.blockwise.sequential import SequentialBlock
from sparsekern.pruning.blockwise.shelf import Shelf
from sparsekern.pruning.checkpoint import TUNING
from sparsekern.pruning.saving import RunFolder
from tests.models.families import tiny_ids
from tests.models.test_streaming import folder_of

from .live_tensors import LiveTensors
from .test_max_memory import least
from .test_streamed import equal, tensors_of

TUNE = BlockTuning(passes=1, batch_tokens=96, learning_rate=1e-3)
STAGES = {
    "in stages": {"correction": "sequential"},
    "corrected": {"correction": "dense"},
    "tuned": {"tune": TUNE},
    "both": {"correction": "dense", "tune": TUNE},
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*calibration tokens for:sparsekern.SparsekernWarning", "ignore:.*router gates:sparsekern.SparsekernWarning"
)


def pruned(model, out, *, stream=False, method="wanda", **options):
    """Prune a model, or that of a folder."""
    if isinstance(model, Path):
        model = sparsekern.load(model, device="cpu", stream=stream)
    options = {"calibration": tiny_ids(16, 12), "batch_size": 4, "progress": False} | options
    return sparsekern.prune(model, method, "2:4", out=out, **options)


def without_seconds(report):
    layers = [{**vars(layer), "seconds": 0} for layer in report.layers]
    return layers, [{**row, "seconds": 0} for row in report.tuning]


@pytest.mark.parametrize(
    ("kind", "stages"), [("llama_tied", "corrected"), ("gpt2", "tuned"), ("llama", "both"), ("mixtral", "in stages")]
)
def test_the_bits_are_those_of_a_model_in_memory(kind, stages, tmp_path):
    folder = folder_of(kind, tmp_path / "model", "20KB")
    first, second = (pruned(folder, tmp_path / f"{stream}", stream=stream, **STAGES[stages]) for stream in (False, True))
    assert equal(tensors_of(tmp_path / "True"), tensors_of(tmp_path / "False"))
    assert without_seconds(first) == without_seconds(second)
    assert len(second.tuning) == (3 if "tune" in STAGES[stages] else 0)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("stages", "format"), [("corrected", "dense"), ("both", "packed")])
def test_a_killed_run_goes_on_to_the_same_bits(stages, format, tmp_path, monkeypatch):
    """The dense weights of the finished blocks are read where they were before the first run."""
    folder = folder_of("llama_tied", tmp_path / "model")
    options = {"stream": True, "format": format, **STAGES[stages]}
    whole = pruned(folder, tmp_path / "whole", **options)
    prune_block = BlockLoop._prune_block

    def killed(self, index, linears):
        if index == 2:
            raise Killed
        prune_block(self, index, linears)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(BlockLoop, "_prune_block", killed)
        pruned(folder, tmp_path / "out", **options)
    report = pruned(folder, tmp_path / "out", resume=True, **options)
    assert report.resumed_blocks == 2 and without_seconds(report) == without_seconds(whole)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


@pytest.mark.parametrize(("method", "stages"), [("sparsegpt", {}), ("wanda", STAGES["both"])], ids=["plain", "both"])
def test_blocks_behind_one_that_is_removed_are_pruned_again_from_dense_weights(method, stages, tmp_path, monkeypatch):
    folder = folder_of("llama_tied", tmp_path / "model")
    options = {"stream": True, "method": method, **stages}

    def killed(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RunFolder, "write", killed)
        pruned(folder, tmp_path / "out", **options)
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    whole = pruned(folder, tmp_path / "whole", resume=True, **options)
    (tmp_path / "out/checkpoint/block-00001.safetensors").unlink()
    report = pruned(folder, tmp_path / "out", resume=True, **options)
    assert (whole.resumed_blocks, report.resumed_blocks) == (3, 1) and without_seconds(report) == without_seconds(whole)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


@pytest.fixture
def failed(tmp_path, monkeypatch):
    """The model of a run that failed once its second block was tuned."""
    model = sparsekern.load(folder_of("llama_tied", tmp_path / "model"), device="cpu", stream=True)
    calls, own = [], tuned.tune_block

    def fails(*arguments):
        found = own(*arguments)
        calls.append(found)
        if len(calls) == 2:
            raise Killed
        return found

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(tuned, "tune_block", fails)
        pruned(model, tmp_path / "out", **STAGES["both"])
    return model


def test_a_failed_block_is_read_again(failed, tmp_path):
    dense = dict(sparsekern.load(tmp_path / "model", device="cpu").model.layers.named_parameters(prefix="layers"))
    for index in (0, 1):
        with in_memory(failed, index):
            same = [
                torch.equal(own, dense[f"layers.{index}.{name}"]) for name, own in failed.model.layers[index].named_parameters()
            ]
        assert all(same) if index else not any(same)


@pytest.mark.parametrize("found", [{}, {TUNING: None}, []])
def test_damaged_seconds_of_a_block_are_refused_by_name(failed, found, tmp_path):
    path = tmp_path / "out/checkpoint/block-00000.json"
    seconds = json.loads(path.read_text())
    assert TUNING in seconds
    path.write_text(json.dumps({name: seconds[name] for name in seconds if name != TUNING} | found if found != [] else found))
    with pytest.raises(ValueError, match=r"block-00000.safetensors is damaged \(.*\); remove it to redo"):
        pruned(tmp_path / "model", tmp_path / "out", stream=True, resume=True, **STAGES["both"])


def test_both_streams_of_hidden_states_leave_the_memory_within_a_limit(tmp_path, monkeypatch):
    folder, limits, written = folder_of("llama_tied", tmp_path / "model"), [], []
    begin, write = Shelf.__init__, Shelf._write
    monkeypatch.setattr(Shelf, "__init__", lambda self, limit=None, *more: limits.append(limit) or begin(self, limit, *more))
    monkeypatch.setattr(Shelf, "_write", lambda self, key, tensor: written.append(self) or write(self, key, tensor))
    options = {"stream": True, "calibration": tiny_ids(60, 48), **STAGES["both"]}
    pruned(folder, tmp_path / "whole", **options)
    assert not written
    needed, _ = least(lambda limit: pruned(folder, tmp_path / "never", max_memory=limit, **options))
    needed, message = least(lambda _: pruned(folder, tmp_path / "never", max_memory=needed, **options))
    assert "for the dense weights of a block" in message and "for tuning a block" in message
    pruned(folder, tmp_path / "limited", max_memory=needed, **options)
    halves = [limit for limit in limits if limit is not None]
    assert len(set(map(id, written))) == 2 and halves[-1] == halves[-2] < 100_000
    assert equal(tensors_of(tmp_path / "limited"), tensors_of(tmp_path / "whole"))


def test_the_tensors_of_the_stages_fit_into_what_is_counted(tmp_path, monkeypatch):
    """With few tokens, so that what is kept of weights matters, masters of 16-bit ones too. No more is counted than half as much again."""
    needs, counted, most = {}, memory.room_beside, {}

    def told(model, limit, found=None, **more):
        needs.update(found or {})
        return counted(model, limit, found, **more)

    def watched(name, own):
        def run(*arguments):
            with LiveTensors() as live:
                found = own(*arguments)
            most[name] = max(most.get(name, 0), live.most)
            return found

        return run

    monkeypatch.setattr(memory, "room_beside", told)
    monkeypatch.setattr(tuned.BlockTuner, "_tune", watched("tune", tuned.BlockTuner._tune))
    monkeypatch.setattr(SequentialBlock, "solve", watched("solve", SequentialBlock.solve))
    model = sparsekern.load(folder_of("llama_tied", tmp_path / "model"), device="cpu", stream=True, dtype="bfloat16")
    options = {
        "calibration": tiny_ids(16, 2),
        "batch_size": 1,
        "correction": "dense",
        "tune": replace(TUNE, batch_tokens=8),
        "include": ["*.layers.1.*"],
    }
    pruned(model, tmp_path / "out", max_memory="8GB", **options)
    assert needs[memory.TUNING] / 1.5 < most["tune"] < needs[memory.TUNING] + needs[memory.BATCH]
    solving = needs[memory.STATISTICS] + needs[memory.SOLVING]
    assert solving / 1.5 < most["solve"] < solving + needs[memory.BATCH]
