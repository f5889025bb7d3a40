"""The folder that a continual run leaves between datasets: resumed, abandoned, locked, damaged, of another run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sparsekern
from sparsekern import COPAL, SparseGPT, Wanda, prune_continually
from sparsekern import _files as files
from sparsekern.pruning.continual.state import StepFiles
from sparsekern.pruning.saving import check_new_out
from sparsekern.runtime import output
from tests.pruning.test_continual import IDS, QUIET, run, same, weights
from tests.tiny import llama


@pytest.mark.parametrize(("method", "blocks"), [(COPAL(), 0), (COPAL(), 1), (COPAL(), 3), (SparseGPT(), 1)])
def test_a_killed_run_is_resumed_bit_for_bit(method, blocks, tmp_path, monkeypatch):
    whole, report = run(method, "abc", evaluate={"a": IDS["a"]}, length=32)
    save, left = StepFiles.save, [3 + blocks]

    def killing(self, *args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save(self, *args)

    monkeypatch.setattr(StepFiles, "save", killing)
    more = {"state": tmp_path / "state", "evaluate": {"a": IDS["a"]}, "length": 32}
    with pytest.raises(KeyboardInterrupt):
        run(method, "abc", **more)
    monkeypatch.setattr(StepFiles, "save", save)
    if blocks < 3:
        with pytest.raises(
            ValueError, match=r"holds an unfinished step, 'b'; pass resume=True \(--resume\) and that dataset to go on, or"
        ):
            run(method, "bc", **more)
        with pytest.raises(ValueError, match="calibrations: expected 'b' next, unchanged, to finish its step .* abandon=True"):
            run(method, "c", resume=True, **more)
    model, resumed = run(method, "abc", resume=True, **more)
    assert same(model, weights(whole)) and resumed.matrix == report.matrix
    again, _ = run(method, "abc", resume=True, **more)  # nothing is left to do
    assert same(again, weights(whole))


def test_a_bad_data_set_can_be_abandoned(tmp_path):
    good = {name: ids.clamp(min=1) for name, ids in IDS.items()}
    bad = good["b"].index_fill(1, torch.tensor([31]), 0)

    def not_finite_behind_token_0():
        model = llama()
        with torch.no_grad():
            model.model.embed_tokens.weight[0] = float("inf")
        return model

    def go_on(name: str, data=None, **more):
        return prune_continually(model, {name: good[name] if data is None else data}, COPAL(), 0.5, state=tmp_path, **QUIET, **more)

    model = whole = not_finite_behind_token_0()
    prune_continually(whole, good, COPAL(), 0.5, **QUIET)
    model = not_finite_behind_token_0()
    go_on("a")
    with pytest.raises(ValueError, match="its input is nan"):
        go_on("b", bad)
    for more in ({}, {"resume": True}):
        with pytest.raises(ValueError, match="abandon=True"):
            go_on("c", **more)
    with pytest.raises(ValueError, match="abandon: expected resume=False, since resume=True goes on with the unfinished step"):
        go_on("c", resume=True, abandon=True)
    with pytest.raises(ValueError, match="'a' was used already"):
        go_on("a", abandon=True)
    with pytest.raises(ValueError, match="holds an unfinished step"):  # a call that is refused abandons nothing
        go_on("b")
    go_on("b", abandon=True)  # repaired
    with pytest.raises(ValueError, match="abandon: .* holds no unfinished step"):
        go_on("c", abandon=True)
    go_on("c")
    assert same(model, weights(whole))


def test_an_abandoned_step_leaves_no_trace(tmp_path, monkeypatch):
    whole, _ = run(COPAL(), "ac")
    run(COPAL(), "a", state=tmp_path)
    save = StepFiles.save

    def killing(self, index, *args):
        save(self, index, *args)
        if index == 1:
            raise KeyboardInterrupt

    model = llama()
    with monkeypatch.context() as patch:
        patch.setattr(StepFiles, "save", killing)
        with pytest.raises(KeyboardInterrupt):
            prune_continually(model, {"b": IDS["b"]}, COPAL(), 0.5, evaluate={"b": IDS["b"]}, state=tmp_path, length=32, **QUIET)
    report = prune_continually(model, {"c": IDS["c"]}, COPAL(), 0.5, state=tmp_path, abandon=True, **QUIET)
    assert same(model, weights(whole)) and report.names == ["a", "c"] and report.dense == {}
    assert '"b"' not in (tmp_path / "state.json").read_text()


def test_a_state_is_for_one_call_at_a_time(tmp_path, monkeypatch):
    run(COPAL(), "a", state=tmp_path)
    save, refused = StepFiles.save, []

    def meanwhile(self, *args):
        if not refused:
            with pytest.raises(ValueError, match="state: .* is in use by another process or call; wait until it is done") as error:
                run(COPAL(), "c", state=tmp_path)
            refused.append(error)
        save(self, *args)

    monkeypatch.setattr(StepFiles, "save", meanwhile)
    model, report = run(COPAL(), "b", state=tmp_path)
    assert refused and report.names == ["a", "b"] and same(model, weights(run(COPAL(), "ab")[0]))


def test_a_lock_goes_with_its_process(tmp_path):
    path = tmp_path / "lock"
    script = f"""
import pathlib, runpy, sys
with runpy.run_path({files.__file__!r})["locked"](pathlib.Path({str(path)!r}), "it"):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="it is in use by another process or call"), files.locked(path, "it"):
        pass
    holder.kill()
    holder.communicate()
    with files.locked(path, "it"):
        assert path.exists()
    assert not path.exists()


def test_step_files_of_another_data_set_are_refused(tmp_path):
    for name in "ac":
        run(COPAL(), name, state=tmp_path / name)
    block = "step-0001-00001.safetensors"
    (tmp_path / "a" / block).write_bytes((tmp_path / "c" / block).read_bytes())
    with pytest.raises(ValueError, match="state: expected step-0001-00001 to be of 'a', got that of another dataset"):
        run(COPAL(), "b", state=tmp_path / "a")
    (tmp_path / "a" / block).unlink()
    with pytest.raises(ValueError, match="step-0001-00001.safetensors is missing; the state cannot be continued"):
        run(COPAL(), "b", state=tmp_path / "a")


def test_a_data_set_is_always_evaluated_on_the_same_windows(tmp_path):
    more = {"state": tmp_path, "length": 32}
    run(COPAL(), "a", evaluate={"a": IDS["a"]}, **more)
    with pytest.raises(ValueError, match=r"evaluate\['a'\]: expected the tokens that it was evaluated on before, got others"):
        run(COPAL(), "b", evaluate={"a": IDS["c"]}, **more)
    with pytest.raises(ValueError, match="length: expected 32, with which 'a' was evaluated before, got 16"):
        run(COPAL(), "b", evaluate={"a": IDS["a"]}, **more | {"length": 16})
    run(COPAL(), "b", evaluate={"a": IDS["a"].flatten()}, **more)  # the same windows


def test_an_older_state_is_gone_on_with(tmp_path):
    """It does not know what it was evaluated on, nor its step files their dataset."""
    from safetensors.torch import load_file, save_file

    evaluate = {"a": IDS["a"]}
    whole, _ = run(COPAL(), "ab", evaluate=evaluate, length=32)
    run(COPAL(), "a", evaluate=evaluate, length=32, state=tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    del state["evaluation"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    for path in tmp_path.glob("step-*"):
        save_file(load_file(path), path, {"note": "[]"})
    model, _ = run(COPAL(), "b", evaluate=evaluate, length=32, state=tmp_path)
    assert same(model, weights(whole))
    with pytest.raises(ValueError, match=r"evaluate\['a'\]: expected the tokens that it was evaluated on before, got others"):
        run(COPAL(), "c", evaluate={"a": IDS["b"]}, length=32, state=tmp_path)


def test_a_state_is_not_mixed_with_the_pruned_model(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "state")
    with pytest.raises(ValueError, match="^out: expected another folder than state, got '.*link' for both$"):
        run(COPAL(), "a", state=tmp_path / "state", out=tmp_path / "link")
    assert not (tmp_path / "state").exists()


def test_a_state_that_is_none(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other holds no state.json, so it is not a state of prune_continually"):
        run(COPAL(), "a", state=tmp_path / "other")
    with pytest.raises(ValueError, match="notes.txt is not a folder"):
        run(COPAL(), "a", state=tmp_path / "other" / "notes.txt")


def test_a_damaged_block_of_an_unfinished_step_is_done_again(tmp_path, monkeypatch):
    whole, _ = run(COPAL(), "ab")

    def killing(self, index, result, save=StepFiles.save):
        save(self, index, result)
        if (self.name, index) == ("b", 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepFiles, "save", killing)
        run(COPAL(), "ab", state=tmp_path)
    block, other = tmp_path / "step-0002-00001.safetensors", tmp_path / "step-0001-00001.safetensors"
    for content in (block.read_bytes()[:100], other.read_bytes()):
        block.write_bytes(content)
        with pytest.raises(ValueError, match="step-0002-00001.* remove it to redo its part of the step"):
            run(COPAL(), "ab", state=tmp_path, resume=True)
    block.unlink()
    model, _ = run(COPAL(), "ab", state=tmp_path, resume=True)
    assert same(model, weights(whole))


@pytest.mark.parametrize(
    "change", [lambda weight: weight + 1, lambda weight: weight * torch.nan, lambda weight: weight[:1].clone()]
)
def test_a_block_that_is_refused_comes_with_what_to_do(tmp_path, monkeypatch, change):
    """Not pruned, not finite, of another shape."""

    def killing(self, index, result, save=StepFiles.save):
        save(self, index, result)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepFiles, "save", killing)
        run(COPAL(), "a", state=tmp_path)
    block = tmp_path / "step-0001-00000.safetensors"
    with safe_open(block, framework="pt") as file:
        tensors, note = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({name: change(value) if name.startswith("weight/") else value for name, value in tensors.items()}, block, note)
    with pytest.raises(ValueError, match="state: .*step-0001-00000.* remove it to redo its part of the step$"):
        run(COPAL(), "a", state=tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"{}", "cut", "of another step"])
def test_a_step_with_a_damaged_block_can_be_abandoned(tmp_path, monkeypatch, content):
    whole, _ = run(COPAL(), "ac")
    run(COPAL(), "a", state=tmp_path)

    def killing(self, index, result, save=StepFiles.save):
        save(self, index, result)
        if index == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepFiles, "save", killing)
        run(COPAL(), "b", state=tmp_path)
    block, other = tmp_path / "step-0002-00001.safetensors", tmp_path / "step-0001-00001.safetensors"
    damaged = {"cut": block.read_bytes()[:-1], "of another step": other.read_bytes()}
    block.write_bytes(damaged.get(content, content))
    foreign = llama()
    with torch.no_grad():
        foreign.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="is of another model: model.layers.1.mlp.up_proj"):
        prune_continually(foreign, {"c": IDS["c"]}, COPAL(), 0.5, state=tmp_path, abandon=True, **QUIET)
    assert block.exists()
    model, report = run(COPAL(), "c", state=tmp_path, abandon=True)
    assert same(model, weights(whole)) and report.names == ["a", "c"]


def test_a_damaged_block_of_a_finished_step_cannot_be_abandoned(tmp_path, monkeypatch):
    run(COPAL(), "a", state=tmp_path)

    def killing(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepFiles, "save", killing)
        run(COPAL(), "b", state=tmp_path)
    (tmp_path / "step-0001-00001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="step-0001-00001.* is damaged .*; the state cannot be continued"):
        run(COPAL(), "c", state=tmp_path, abandon=True)


def test_what_is_refused_leaves_no_state(tmp_path):
    with pytest.raises(ValueError, match="abandon: .* holds no unfinished step"):
        run(COPAL(), "a", state=tmp_path / "new", abandon=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="abandon: .* holds no unfinished step"):
        run(COPAL(), "a", state=tmp_path / "empty", abandon=True)
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("moved", [0, 3])
def test_killed_amid_the_moves_of_the_finished_model(tmp_path, monkeypatch, moved):
    """The next call finishes the moves, and says that the run is finished."""
    out, move, left = tmp_path / "out", output._replace, [moved]

    def killed(source, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        move(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output, "_replace", killed)
        run(COPAL(), "a", state=tmp_path / "state", out=out)
    assert not (out / "config.json").exists()
    check_new_out(out)
    for _ in range(2):
        with pytest.raises(FileExistsError, match="out: .* holds a finished run, so there is nothing to resume: sparsekern.load"):
            run(COPAL(), "a", state=tmp_path / "state", out=out, resume=True)
    with pytest.raises(FileExistsError, match="holds a finished run"):
        check_new_out(out)
    model, _ = run(COPAL(), "a", state=tmp_path / "state", resume=True)
    assert same(sparsekern.load(out, device="cpu"), weights(model))


def test_damaged_states(tmp_path):
    run(COPAL(), "a", state=tmp_path)
    state, block = tmp_path / "state.json", tmp_path / "step-0001-00001.safetensors"
    whole = block.read_bytes()
    block.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="state: .*step-0001-00001.safetensors is damaged"):
        run(COPAL(), "b", state=tmp_path)
    block.write_bytes((tmp_path / "step-0001-00000.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match="state: .*step-0001-00001.safetensors holds other linears than the model's; the state cannot"
    ):
        run(COPAL(), "b", state=tmp_path)
    found = json.loads(state.read_text())
    for text, message in (
        ("{", "state.json is not a state of prune_continually"),
        ("[]", "state.json is not a state of prune_continually"),
        (json.dumps({**found, "format": 9}), "state.json has format 9, this version reads 1"),
    ):
        state.write_text(text)
        with pytest.raises(ValueError, match=message):
            run(COPAL(), "b", state=tmp_path)


def test_a_state_of_something_else(tmp_path):
    run(COPAL(), "a", state=tmp_path)
    for change, message in (
        ({"method": COPAL(scope="matrix")}, r"was made with another method \(scope: expected row, got matrix\)"),
        ({"method": Wanda()}, r"was made with another method \(name: expected copal, got wanda\)"),
        ({"pattern": "2:4"}, r"was made with another patterns \(model.layers.0.self_attn.q_proj: expected 0.5, got 2:4\)"),
        ({"exclude": "*.0.self_attn.v_proj"}, r", patterns \(model.layers.0.self_attn.v_proj: expected 0.5, got nothing\)"),
        ({"strategy": "carry", "seed": 1}, r"another seed \(expected 0, got 1\), strategy \(expected accumulate, got carry\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{"method": COPAL(), "names": "b", "state": tmp_path, **change})
    foreign = llama()
    with torch.no_grad():
        foreign.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    call = {"calibrations": {"b": IDS["b"]}, "method": COPAL(), "pattern": 0.5, "state": tmp_path, **QUIET}
    with pytest.raises(
        ValueError, match="is of another model: model.layers.1.mlp.up_proj is neither its dense nor its pruned weight"
    ):
        prune_continually(foreign, **call)
    with torch.no_grad():
        foreign.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="was made with another model"):
        prune_continually(foreign, **call)
