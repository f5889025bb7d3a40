"""Files of a checkpoint that are damaged, forged, or another run's: refused by name, and never taken for results."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparsekern import SparseGPT

from .unfinished import Interrupted, interrupted_run, run


def test_a_truncated_block_is_refused(unfinished):
    path = unfinished / "checkpoint" / "block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"block-00001.safetensors is damaged \(.*\); remove it to redo its part of the run"):
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
    with pytest.raises(ValueError, match=f"out: .*block-00000.safetensors.*{message}.*; remove it to redo its part of the run"):
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
