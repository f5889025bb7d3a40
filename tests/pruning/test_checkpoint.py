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
from safetensors import safe_open
from safetensors.torch import save_file
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


def test_a_truncated_block_is_refused(unfinished):
    path = unfinished / "checkpoint" / "block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"block-00001.safetensors is damaged \(.*\); remove it to do its part of the run again"):
        run(unfinished, resume=True)
    path.unlink()
    model, report = run(unfinished, resume=True)
    assert report.resumed_blocks == 1 and report.sparsity == 0.5


def rewrite(path, change):
    """Replace a block's file by one with other weights or another note, as somebody might who has the folder."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        note = json.loads(file.metadata()["note"])
    change(tensors, note)
    save_file(tensors, path, {"note": json.dumps(note)})


Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def dense(tensors, note):
    tensors[UP] = torch.ones_like(tensors[UP])


def dense_and_said_to_be(tensors, note):
    dense(tensors, note)
    for layer in note["layers"]:
        layer["zeros"] = 0 if layer["name"] == UP else layer["zeros"]


def of_another_pattern(tensors, note):
    tensors[UP] = tensors[UP].clone()
    tensors[UP][:, :2] = 0
    for layer in note["layers"]:
        layer |= {"pattern": "0.5", "zeros": int((tensors[layer["name"]] == 0).sum())}


def not_a_number(tensors, note):
    tensors[UP][0, (tensors[UP][0] != 0).nonzero()[0]] = float("nan")


def infinite(tensors, note):
    tensors[UP][0, (tensors[UP][0] != 0).nonzero()[0]] = float("-inf")


def of_another_dtype(tensors, note):
    tensors[UP] = tensors[UP].bfloat16()


def of_another_shape(tensors, note):
    tensors[UP] = tensors[UP][:1]


def without_one(tensors, note):
    del tensors[UP]


def with_another(tensors, note):
    tensors["extra"] = torch.ones(1)


def without_a_report(tensors, note):
    note["layers"].pop()


def of_other_settings(tensors, note):
    note["run"] = "0" * 64


def of_no_run(tensors, note):
    del note["run"]


def with_a_strange_report(tensors, note):
    note["layers"][0] = {"name": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dense, f"{UP} is not pruned to 2:4: 0 of"),
        (dense_and_said_to_be, f"{UP} is not pruned to 2:4: 0 of"),
        (of_another_pattern, "expected 2:4 of .*, got 0.5 of"),
        (not_a_number, f"{UP} holds NaN or Inf"),
        (infinite, f"{UP} holds NaN or Inf"),
        (of_another_dtype, "holds other linears than the model's"),
        (of_another_shape, "holds other linears than the model's"),
        (without_one, "holds other linears than the model's"),
        (with_another, "holds other linears than the model's"),
        (without_a_report, "holds reports of other linears than its weights"),
        (of_other_settings, "is of a run with other settings"),
        (of_no_run, r"is damaged \(its note is not that of a run\)"),
        (with_a_strange_report, "is damaged"),
    ],
)
def test_a_block_that_this_run_did_not_write_is_refused(unfinished, change, message):
    path = unfinished / "checkpoint" / "block-00000.safetensors"
    rewrite(path, change)
    with pytest.raises(ValueError, match=f"out: .*block-00000.safetensors.*{message}.*; remove it to do its part of the run again"):
        run(unfinished, resume=True)
    path.unlink()
    _, report = run(unfinished, resume=True)
    assert report.resumed_blocks == 0 and report.sparsity == 0.5  # nothing behind a missing block is taken


def test_the_block_of_another_run_is_refused(unfinished, monkeypatch):
    """It fits in every respect, and is pruned; only the settings that it was made with are others."""
    other = unfinished.parent / "other"
    with pytest.raises(Interrupted):
        interrupted_run(other, monkeypatch, method=SparseGPT(damping=0.1))
    name = "checkpoint/block-00000.safetensors"
    (unfinished / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ValueError, match="block-00000.safetensors is of a run with other settings; remove it"):
        run(unfinished, resume=True)


def interrupted_run(out, monkeypatch, **arguments):
    def interrupted(self, index, result, save=checkpoint.Checkpoint.save):
        save(self, index, result)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", interrupted)
        run(out, **arguments)


def test_a_block_of_other_layers_is_refused(unfinished):
    folder = unfinished / "checkpoint"
    (folder / "block-00000.safetensors").write_bytes((folder / "block-00001.safetensors").read_bytes())
    with pytest.raises(ValueError, match="block-00000.safetensors holds other linears than the model's"):
        run(unfinished, resume=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "settings": 3, "environment": {}}'])
def test_a_damaged_state_is_refused(unfinished, content):
    (unfinished / "checkpoint" / "state.json").write_text(content)
    with pytest.raises(ValueError, match="state.json is not a checkpoint's state .* to start over"):
        run(unfinished, resume=True)


def test_a_state_of_another_format_is_refused(unfinished):
    path = unfinished / "checkpoint" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 2"):
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
