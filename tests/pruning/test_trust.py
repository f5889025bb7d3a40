"""Files of a training run, a removal and a continual state that were changed by somebody else: refused by name, nothing is changed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sparsekern
from sparsekern import COPAL, Gradual, KPrune
from sparsekern.pruning.checkpoint import Checkpoint
from sparsekern.pruning.gradual.training_state import TrainingState
from tests import encoders
from tests.models.families import tiny_ids, tiny_model
from tests.pruning.test_continual import run as continue_with
from tests.pruning.test_continual import same, weights

QUIET = {"progress": False}
NAN = float("nan")


class Killed(BaseException):
    """Ends a run where a signal would have killed it."""


def rewrite(path, change) -> None:
    """Replace a file by one with other tensors or another note."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        note = json.loads(file.metadata()["note"])
    change(tensors, note)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"note": json.dumps(note)})


def put(name, tensor):
    """Return a change that sets a tensor, or takes it away where `tensor` is None; a function is given the one that is there."""

    def change(tensors, note):
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor(tensors[name].clone()) if callable(tensor) else tensor

    return change


def noted(**entries):
    """Return a change of the note."""
    return lambda tensors, note: note.update(entries)


def train(model, out, **more):
    method = Gradual(steps=2, train_steps=2, batch_tokens=40, learning_rate=1e-3)
    return sparsekern.prune(model, method, 0.5, tiny_ids(4, 16), batch_size=2, out=out, **QUIET, **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that was killed between its two pruning steps."""
    out = tmp_path_factory.mktemp("gradual") / "out"
    finish = TrainingState.finish_step

    def killed(self, step):
        finish(self, step)
        raise Killed

    TrainingState.finish_step = killed
    try:
        with pytest.raises(Killed):
            train(tiny_model("llama"), out)
    finally:
        TrainingState.finish_step = finish
    return out


WEIGHT = "weight/model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(WEIGHT, None), f"damaged .{WEIGHT} is missing"),
        (put(WEIGHT, torch.ones(1)), "is not of this model"),
        (put(WEIGHT, lambda found: found.t()), "is not of this model"),
        (put(WEIGHT, lambda found: found.bfloat16()), "expected torch.float32"),
        (put(WEIGHT, lambda found: found.fill_(NAN)), "holds NaN or Inf"),
        (put("weight/other", torch.ones(1)), "is not of this model"),
        (put("exp_avg/lm_head.weight", torch.ones(1)), "is not of this model"),
        (put("anything", torch.ones(1)), "is not of this model"),
        (put("mask/model.layers.0.mlp.up_proj", torch.ones(2)), "is not a mask"),
        (noted(run="0"), "is of a run with other settings"),
        (noted(curve=None), "is damaged"),
        (lambda tensors, note: note.pop("done"), "is damaged"),
    ],
)
def test_a_training_state_that_this_run_did_not_write_is_refused(trained, change, message):
    path = trained / "checkpoint" / "training.safetensors"
    whole = path.read_bytes()
    try:
        rewrite(path, change)
        model = tiny_model("llama")
        with pytest.raises(ValueError, match=f"out: .*training.safetensors.*{message}"):
            train(model, trained, resume=True)
    finally:
        path.write_bytes(whole)
    assert same(model, weights(tiny_model("llama")))


def remove(model, out, **more):
    return sparsekern.prune(model, KPrune(remove=0.3), None, [encoders.padded_ids()], out=out, **QUIET, **more)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The folder of a run that was killed after its first sub-layer."""
    out, save = tmp_path_factory.mktemp("kprune") / "out", Checkpoint.save

    def killed(self, index, result):
        save(self, index, result)
        raise Killed

    Checkpoint.save = killed
    try:
        with pytest.raises(Killed), pytest.warns(sparsekern.SparsekernWarning):
            remove(encoders.tiny("bert"), out)
    finally:
        Checkpoint.save = save
    return out


@pytest.mark.parametrize(
    "change",
    [
        put("kept", lambda found: found + 100),
        put("kept", lambda found: found - 100),
        put("kept", lambda found: torch.zeros_like(found)),
        put("kept", lambda found: found.flip(0)),
        put("kept", lambda found: found[:-1]),
        put("kept", lambda found: found.float()),
        put("kept", lambda found: found[None]),
        put("kept", None),
        put("weight", lambda found: found[:, 1:]),
        put("weight", lambda found: found.half()),
        put("weight", lambda found: found.fill_(NAN)),
        put("bias", torch.zeros(1)),
        put("extra", torch.zeros(1)),
        noted(run="0"),
        noted(layers=[]),
        noted(layers=[{"name": "it"}]),
    ],
)
def test_a_cut_that_this_run_did_not_write_is_refused(cut, change):
    path = cut / "checkpoint" / "block-00000.safetensors"
    whole = path.read_bytes()
    try:
        rewrite(path, change)
        model = encoders.tiny("bert")
        with pytest.raises(ValueError, match="out: .*block-00000.safetensors"):
            remove(model, cut, resume=True)
    finally:
        path.write_bytes(whole)
    encoders.assert_same_weights(model, encoders.tiny("bert"))


Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continual")
    continue_with(COPAL(), "a", state=folder)
    return folder


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("dense", put(Q, lambda found: found.fill_(NAN)), "holds NaN or Inf"),
        ("dense", put(Q, lambda found: found.half()), "holds other linears than the model's"),
        ("step-0001", put(f"weight/{Q}", lambda found: found.fill_(1)), "is not pruned to 0.5: 0 of"),
        ("step-0001", put(f"weight/{Q}", lambda found: found.fill_(NAN)), "holds NaN or Inf"),
        ("step-0001", put(f"weight/{Q}", None), "holds other linears than the model's"),
        ("step-0001", put(f"memory/{Q}", lambda found: found.fill_(NAN)), "holds NaN or Inf"),
        ("step-0001", noted(run="0"), "to be of this run, got that of one with other settings"),
        ("step-0001", noted(layers=[{}]), "is damaged"),
        ("step-0001", noted(layers=3), "is damaged"),
    ],
)
def test_a_state_that_was_changed_is_refused(state, file, change, message):
    path = state / f"{file}-00001.safetensors"
    whole, before = path.read_bytes(), {entry.name for entry in state.iterdir()}
    try:
        rewrite(path, change)
        with pytest.raises(ValueError, match=f"state: .*{file}-00001.*{message}"):
            continue_with(COPAL(), "b", state=state)
    finally:
        path.write_bytes(whole)
        for left in {entry.name for entry in state.iterdir()} - before:
            (state / left).unlink()
        text = json.loads((state / "state.json").read_text())
        (state / "state.json").write_text(json.dumps({**text, "seen": text["seen"][:1]}))


def test_the_files_are_sound_otherwise(trained, cut, state):
    """Or else the tests above would pass for another reason."""
    assert train(tiny_model("llama"), trained, resume=True).sparsity == pytest.approx(0.5, abs=0.01)
    assert remove(encoders.tiny("bert"), cut, resume=True).resumed_blocks == 1
    assert continue_with(COPAL(), "b", state=state)[1].names == ["a", "b"]
