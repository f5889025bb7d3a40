"""Killed, resumed, damaged, foreign, full: what is in the output folder when a run does not end well."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsekern
from sparsekern import SparseGPT, SparsekernWarning, SparseLLM
from sparsekern import _files as files
from sparsekern.pruning import checkpoint
from tests.models.families import tiny_ids, tiny_model

QUIET = {"progress": False}
ROOT = Path(__file__).resolve().parents[2]


class Interrupted(Exception):
    pass


def run(out, *, family="llama", method="sparsegpt", ids=None, **arguments):
    model = tiny_model(family)
    report = sparsekern.prune(model, method, "2:4", tiny_ids() if ids is None else ids, out=out, **QUIET, **arguments)
    return model, report


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """An output folder of a run that stopped after two of three blocks."""

    def interrupted(self, index, result, save=checkpoint.Checkpoint.save):
        save(self, index, result)
        if index == 1:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", interrupted)
        with pytest.raises(Interrupted):
            run(tmp_path / "out")
    return tmp_path / "out"


def test_a_whole_run_leaves_the_model_and_its_report(tmp_path):
    model, report = run(tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoint").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["results"]["sparsity"] == report.sparsity == 0.5
    assert len(written["layers"]) == 21
    assert "write" in written["run"]["seconds"]


def test_resuming_gives_the_same_bits(unfinished, monkeypatch):
    expected, whole = run(unfinished.parent / "whole")
    assert sorted(path.name for path in (unfinished / "checkpoint").iterdir()) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
        "state.json",
    ]
    solved = []
    plain = SparseGPT.solve
    monkeypatch.setattr(SparseGPT, "solve", lambda self, *args: solved.append(1) or plain(self, *args))
    model, report = run(unfinished, resume=True)
    assert len(solved) == 7  # one block
    assert report.resumed_blocks == 2
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    keep = ("name", "pattern", "shape", "zeros", "error")
    for one, other in zip(whole.layers, report.layers, strict=True):
        assert [getattr(one, key) for key in keep] == [getattr(other, key) for key in keep]
    assert not (unfinished / "checkpoint").exists()


@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_resuming_works_for_transposed_and_fused_weights(tmp_path, monkeypatch, family):
    def interrupted(self, index, result, save=checkpoint.Checkpoint.save):
        save(self, index, result)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", interrupted)
        with pytest.raises(Interrupted):
            run(tmp_path / "out", family=family)
    model, _ = run(tmp_path / "out", family=family, resume=True)
    expected, _ = run(tmp_path / "whole", family=family)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize(
    "method, blocks",  # of four: the head comes after three
    [("magnitude", 4), ("wanda", 4), ("alps", 4), ("random", 2), (SparseLLM("random", iterations=2), 2)],
    ids=["magnitude", "wanda", "alps", "random", "sparsellm"],
)
def test_other_methods_and_the_head_resume_too(tmp_path, monkeypatch, method, blocks):
    def interrupted(self, index, result, save=checkpoint.Checkpoint.save):
        save(self, index, result)
        if index + 1 == blocks:
            raise Interrupted

    arguments = {"method": method, "include": ["*", "lm_head"]}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", interrupted)
        with pytest.raises(Interrupted):
            run(tmp_path / "out", **arguments)
    model, report = run(tmp_path / "out", resume=True, **arguments)
    expected, _ = run(tmp_path / "whole", **arguments)
    assert report.resumed_blocks == blocks
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


CHILD = """
import sys, time
import sparsekern
from tests.models.families import tiny_ids, tiny_model

class Slow(sparsekern.SparseGPT):
    def solve(self, *arguments):
        time.sleep(0.1)
        return super().solve(*arguments)

sparsekern.prune(tiny_model("llama"), Slow(), "2:4", tiny_ids(), out=sys.argv[1], progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_killed_process_is_resumed_to_the_same_bits(tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(out)], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint" / "block-00000.safetensors").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no block was finished in two minutes"
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "config.json").exists()
    model, report = run(out, resume=True)
    assert 1 <= report.resumed_blocks < 3
    expected, _ = run(tmp_path / "whole")
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_an_unfinished_run_is_not_overwritten(unfinished):
    with pytest.raises(ValueError, match="holds an unfinished run; pass resume=True to go on with it, or remove"):
        run(unfinished)
    assert (unfinished / "checkpoint" / "block-00001.safetensors").exists()


@pytest.mark.parametrize(
    "arguments, what",
    [
        ({"method": "wanda"}, "method"),
        ({"method": SparseGPT(damping=0.02)}, "method"),
        ({"seed": 1}, "seed"),
        ({"exclude": "*.q_proj"}, "patterns"),
        ({"patterns": {"*.q_proj": 0.5}}, "patterns"),
        ({"ids": tiny_ids(seed=2)}, "calibration"),
        ({"batch_size": 2}, "calibration"),
        ({"family": "qwen3"}, "model"),
        ({"report_error": True, "seed": 3}, "report_error, seed"),
    ],
)
def test_another_run_s_checkpoint_is_refused(unfinished, arguments, what):
    with pytest.raises(ValueError, match=f"belongs to another run, with another .*{what}.*; call with the same model and settings"):
        run(unfinished, resume=True, **arguments)
    assert (unfinished / "checkpoint" / "block-00001.safetensors").exists()


def test_one_weight_makes_another_model(unfinished):
    model = tiny_model("llama")
    model.lm_head.weight.data[5, 7] += 1e-6
    with pytest.raises(ValueError, match="belongs to another run, with another model"):
        sparsekern.prune(model, "sparsegpt", "2:4", tiny_ids(), out=unfinished, resume=True, **QUIET)


def test_another_environment_is_said(unfinished):
    path = unfinished / "checkpoint" / "state.json"
    state = json.loads(path.read_text())
    state["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(state))
    with pytest.warns(SparsekernWarning, match="resumed with another torch; the result may differ in rounding"):
        run(unfinished, resume=True)


def test_a_truncated_block_is_refused(unfinished):
    path = unfinished / "checkpoint" / "block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"block-00001.safetensors is damaged \(.*\); remove it to prune that block again"):
        run(unfinished, resume=True)
    path.unlink()
    model, report = run(unfinished, resume=True)
    assert report.resumed_blocks == 1 and report.sparsity == 0.5


def test_a_block_of_other_layers_is_refused(unfinished):
    folder = unfinished / "checkpoint"
    (folder / "block-00000.safetensors").write_bytes((folder / "block-00001.safetensors").read_bytes())
    with pytest.raises(ValueError, match="block-00000.safetensors holds other layers than the model's"):
        run(unfinished, resume=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "settings": 3, "environment": {}}'])
def test_a_damaged_state_is_refused(unfinished, content):
    (unfinished / "checkpoint" / "state.json").write_text(content)
    with pytest.raises(ValueError, match="state.json is not a checkpoint's state .* to start anew"):
        run(unfinished, resume=True)


def test_a_state_of_another_format_is_refused(unfinished):
    path = unfinished / "checkpoint" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        run(unfinished, resume=True)


def test_a_checkpoint_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "pytorch_model.bin").write_text("x")
    with pytest.raises(ValueError, match="holds no state.json, so it is not a checkpoint of a run"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_holds_something_else_is_refused(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"out: .* already holds something else \(thesis.tex\)"):
        run(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    for out in (tmp_path / "out", tmp_path / "out" / "below" / "it"):
        with pytest.raises(FileExistsError, match="out: '.*/out' is a file, expected a folder"):
            run(out)


def test_resuming_nothing_starts(tmp_path):
    _, report = run(tmp_path / "out", resume=True)
    assert report.resumed_blocks == 0 and (tmp_path / "out" / "config.json").exists()


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    def full_at_the_third_block(descriptor, sync=os.fsync):
        if (tmp_path / "out" / "checkpoint" / "block-00001.safetensors").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_at_the_third_block)
        with pytest.raises(OSError, match="no space left while writing [0-9,]+ bytes; what was written before is intact") as caught:
            run(tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    found = sorted(path.name for path in (tmp_path / "out" / "checkpoint").iterdir())
    assert found == ["block-00000.safetensors", "block-00001.safetensors", "state.json"]
    _, report = run(tmp_path / "out", resume=True)
    assert report.resumed_blocks == 2


def test_a_full_disk_at_the_very_end(tmp_path, monkeypatch):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(self, *arguments, **keywords):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(OSError, match="no space left to save the pruned model; all its blocks are kept") as caught:
            run(tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    _, report = run(tmp_path / "out", resume=True)
    assert report.resumed_blocks == 3 and (tmp_path / "out" / "config.json").exists()


def test_other_failures_to_save_are_passed_on(tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    def broken(self, *arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", broken)
    with pytest.raises(OSError, match="the pruned model could not be saved .*Permission denied.*; all its blocks are kept"):
        run(tmp_path / "out")


def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left while writing 3 bytes"):
        files.write_atomically(target, b"new")
    assert target.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["file"]
