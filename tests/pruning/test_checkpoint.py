"""Killed, resumed, foreign, full: what is in the output folder when a run does not end well."""

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
from sparsekern.models.fingerprint import model_fingerprint
from sparsekern.pruning import checkpoint
from tests.models.families import tiny_ids, tiny_model

from .unfinished import QUIET, Interrupted, interrupted_run, run

ROOT = Path(__file__).resolve().parents[2]


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
    solved, save = [], checkpoint.Checkpoint.save
    monkeypatch.setattr(
        checkpoint.Checkpoint, "save", lambda self, index, result: solved.append(index) or save(self, index, result)
    )
    model, report = run(unfinished, resume=True)
    assert solved == [2]
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
        while not (out / "checkpoint" / "block-00000.safetensors").exists():
            assert process.poll() is None, "the run ended before it could be killed"
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
    with pytest.raises(ValueError, match=r"holds an unfinished run; pass resume=True \(--resume\) to continue it, or remove"):
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


def scaled_rotary(model):
    model.model.rotary_emb.inv_freq.mul_(2)


def other_base(model):
    model.config.rope_parameters["rope_theta"] *= 10


def other_window(model):
    model.config.update({"sliding_window": 7})


def more_state(model):
    model.model.layers[0].register_buffer("scale", torch.ones(3))


@pytest.mark.parametrize("change", [scaled_rotary, other_base, other_window, more_state], ids=lambda change: change.__name__)
def test_what_no_parameter_holds_makes_another_model_too(change):
    model, same = tiny_model("llama"), tiny_model("llama")
    before = model_fingerprint(model)
    same.config.use_cache, same.config._name_or_path = False, "elsewhere"
    assert model_fingerprint(same) == before
    change(model)
    assert model_fingerprint(model) != before


def test_the_same_values_at_other_places_are_another_model():
    """The sum of their bits is the same."""
    model = tiny_model("llama")
    before = model_fingerprint(model)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight.copy_(weight.flip(0))
    assert model_fingerprint(model) != before


def test_another_environment_is_said(unfinished):
    path = unfinished / "checkpoint" / "state.json"
    state = json.loads(path.read_text())
    state["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(state))
    with pytest.warns(SparsekernWarning, match="resumed with another torch; the result may differ in rounding"):
        run(unfinished, resume=True)


def test_padding_is_part_of_the_calibration(tmp_path, monkeypatch):
    """The same ids with other padding give other statistics, so they are another run."""
    ids = tiny_ids()
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[1][:, -1] = 0
    first, second = ([{"input_ids": ids, "attention_mask": mask}] for mask in masks)
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "out", monkeypatch, ids=first)
    with pytest.raises(ValueError, match="belongs to another run, with another calibration"):
        run(tmp_path / "out", ids=second, resume=True)
    assert run(tmp_path / "out", ids=first, resume=True)[1].resumed_blocks == 1


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    def full_at_the_third_block(descriptor, sync=os.fsync):
        if (tmp_path / "out" / "checkpoint" / "block-00001.safetensors").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_at_the_third_block)
        with pytest.raises(OSError, match="no space left while writing [0-9,]+ bytes; earlier files are intact") as caught:
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
        with pytest.raises(
            OSError, match="no space left to save the pruned model; what is pruned is kept in .*: resume=True"
        ) as caught:
            run(tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    _, report = run(tmp_path / "out", resume=True)
    assert report.resumed_blocks == 3 and (tmp_path / "out" / "config.json").exists()


def test_other_failures_to_save_are_passed_on(tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    def broken(self, *arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", broken)
    with pytest.raises(
        OSError, match="the pruned model could not be saved .*Permission denied.*; what is pruned is kept in .*: resume=True"
    ):
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
