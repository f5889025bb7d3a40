from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import sparsekern
from sparsekern import COPAL, Magnitude, SparseGPT, Wanda, prune_continually
from sparsekern.models import find_linears
from sparsekern.pruning.blockwise.activations import Activations
from sparsekern.reports import ContinualReport, ContinualStep
from tests.tiny import llama

IDS = {name: torch.randint(320, (4, 32), generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
QUIET = {"progress": False}
METHODS = pytest.mark.parametrize("method", [COPAL(), COPAL(form="gram"), Wanda(), SparseGPT()])


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def run(method, names: str, **more):
    model = llama()
    report = prune_continually(model, {name: IDS[name] for name in names}, method, **{"pattern": 0.5, **QUIET, **more})
    return model, report


@METHODS
def test_one_data_set_is_what_prune_does(method):
    expected = llama()
    sparsekern.prune(expected, method, "4:8", IDS["a"], **QUIET)
    model, report = run(method, "a", pattern="4:8")
    assert same(model, weights(expected))
    assert report.backward_transfer is None and report.steps[0].changed is None and report.steps[0].tokens == 128


@pytest.mark.parametrize(("method", "pattern"), [(COPAL(), "2:4"), (COPAL(form="gram"), 0.5), (Wanda(), "2:4"), (SparseGPT(), 0.5)])
def test_data_sets_one_by_one_from_a_state_are_the_same_run(method, pattern, tmp_path):
    whole, report = run(method, "abc", pattern=pattern, evaluate=IDS, length=32)
    for name in "abc":
        evaluate = {known: IDS[known] for known in "abc"[: "abc".index(name) + 1]}
        model, last = run(method, name, pattern=pattern, state=tmp_path / "state", evaluate=evaluate, length=32)
    assert same(model, weights(whole))
    assert last.matrix == report.matrix and last.names == ["a", "b", "c"]
    assert 0 < last.steps[2].changed < 0.5
    assert last.dense == report.dense == {name: sparsekern.perplexity(llama(), IDS[name], 32) for name in "abc"}
    left = {path.name for path in (tmp_path / "state").iterdir()}
    assert left == {"state.json"} | {f"{kind}-0000{i}.safetensors" for kind in ("dense", "step-0003") for i in range(3)}


def test_another_process_goes_on_with_the_same_bits(tmp_path):
    whole, _ = run(COPAL(), "ab")
    run(COPAL(), "a", state=tmp_path / "state")
    script = f"""
import torch
from tests.pruning.test_continual import run
from sparsekern import COPAL
torch.set_num_threads({torch.get_num_threads()})
run(COPAL(), "b", state={str(tmp_path / "state")!r}, out={str(tmp_path / "out")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert same(sparsekern.load(tmp_path / "out"), weights(whole))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "Time by dataset" in (tmp_path / "out" / "report.html").read_text()
    assert report["results"]["names"] == ["a", "b"] and report["run"]["settings"]["method"]["name"] == "copal"


def test_importance_adds_up_over_data_sets():
    """The mask of the first block, whose inputs no pruning has touched, against the formula on all tokens at once."""
    model, _ = run(COPAL(), "ab", pattern="2:4")
    dense = llama()
    layer = dense.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(dense.model.embed_tokens(torch.cat([IDS["a"], IDS["b"]]))).flatten(0, 1).double()
    weight = layer.self_attn.q_proj.weight.detach().double()
    scores = (weight.abs() * ((x @ weight.T).abs().T @ x.abs())).unflatten(1, (-1, 4))
    kept = torch.zeros_like(scores).scatter(2, scores.topk(2, dim=2).indices, 1).flatten(1)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight != 0, kept != 0)


@pytest.mark.parametrize("method", [COPAL(), Wanda(), SparseGPT()], ids=lambda m: m.name)
def test_old_data_are_not_read_again(method, monkeypatch, tmp_path):
    run(method, "a", state=tmp_path / "state")
    seen = []
    make = Activations.__init__

    def spy(self, model, batches, *more):
        seen.append(torch.cat([batch.inputs["input_ids"] for batch in batches]))
        make(self, model, batches, *more)

    monkeypatch.setattr(Activations, "__init__", spy)
    run(method, "bc", state=tmp_path / "state")
    assert [any(torch.equal(ids, IDS[name]) for name in "bc") for ids in seen] == [True, True]
    stored = b"".join(path.read_bytes() for path in (tmp_path / "state").iterdir())
    assert IDS["a"][0, :8].numpy().tobytes() not in stored


@pytest.mark.parametrize(
    ("method", "pattern"),
    [(Wanda(), 0.5), (Wanda(), "2:4"), (Magnitude(), "2:4"), (SparseGPT(), 0.5), (SparseGPT(), "2:4"), (COPAL(), 0.5)],
)
def test_a_carried_mask_does_not_change_any_more(method, pattern):
    first, _ = run(method, "a", pattern=pattern)
    model, report = run(method, "abc", pattern=pattern, strategy="carry")
    assert same(model, weights(first)) and [step.changed for step in report.steps] == [None, 0.0, 0.0]


@pytest.mark.parametrize("method", [COPAL(), SparseGPT()])
def test_from_dense_only_the_last_data_set_counts(method):
    (alone, _), (before, _) = run(method, "c"), run(method, "b")
    model, report = run(method, "abc", strategy="dense")
    masks = [torch.cat([(linear.weight == 0).flatten() for linear in find_linears(each.model)]) for each in (before, alone)]
    changed = float((masks[0] != masks[1]).double().mean())
    assert same(model, weights(alone)) and report.steps[2].changed == pytest.approx(changed) and changed > 0
    accumulated, _ = run(method, "abc")
    assert not same(accumulated, weights(alone))


def test_magnitude_learns_nothing():
    once = llama()
    sparsekern.prune(once, "magnitude", 0.5, **QUIET)
    model, report = run(Magnitude(), "ab")
    assert same(model, weights(once)) and report.steps[1].changed == 0


def test_cumulative_sparsegpt_sees_the_gram_matrix_of_all(tmp_path):
    run(SparseGPT(), "ab", state=tmp_path)
    from safetensors.torch import load_file

    memory = load_file(tmp_path / "step-0002-00000.safetensors")
    (key,) = (key for key in memory if "q_proj" in key and key.startswith("memory/"))
    assert key.count("|") == 2  # query, key and value share it
    dense = llama()
    x = dense.model.layers[0].input_layernorm(dense.model.embed_tokens(torch.cat([IDS["a"], IDS["b"]]))).flatten(0, 1).detach()
    torch.testing.assert_close(memory[key].tril(), (x.T @ x).tril(), rtol=1e-4, atol=1e-3)


def test_the_pruned_model_can_be_gone_on_with(tmp_path):
    whole, _ = run(COPAL(), "ab")
    model, _ = run(COPAL(), "a", state=tmp_path)
    prune_continually(model, {"b": IDS["b"]}, COPAL(), 0.5, state=tmp_path, **QUIET)
    assert same(model, weights(whole))


def test_masked_padding_does_not_count():
    mask = (torch.arange(32) < 20).expand(4, 32)
    batch = {"input_ids": IDS["b"].masked_fill(~mask, 7), "attention_mask": mask.long()}
    other = {"input_ids": IDS["b"].masked_fill(~mask, 9), "attention_mask": mask.long()}
    models = [llama(), llama()]
    for model, data in zip(models, (batch, other), strict=True):
        report = prune_continually(model, {"a": IDS["a"], "b": [data]}, COPAL(), 0.5, **QUIET)
    assert same(models[0], weights(models[1])) and report.steps[1].tokens == 80


def test_average_and_backward_transfer():
    rows = [{"a": 10.0}, {"a": 12.0, "b": 20.0}, {"a": 13.0, "b": 19.0, "c": 30.0}]
    steps = [ContinualStep(n, 8, 0.5, None, 1.0, row) for n, row in zip("abc", rows, strict=True)]
    report = ContinualReport(dense={"a": 5.0}, steps=steps)
    assert report.matrix == [[10.0, None, None], [12.0, 20.0, None], [13.0, 19.0, 30.0]]
    assert report.average_perplexity == pytest.approx((13 + 19 + 30) / 3)
    assert report.backward_transfer == pytest.approx(((10 - 13) + (20 - 19)) / 2)  # negative: forgetting
    lines = str(report).splitlines()
    assert lines[0].split() == ["after", "a", "b", "c", "(perplexity)"] and lines[1].split() == ["dense", "5.000", "-", "-"]
    assert (
        lines[4].startswith("c      ") and "13.000" in lines[4] and lines[-1] == "backward transfer  -1.000 (negative: forgetting)"
    )
    del rows[2]["a"]
    assert report.average_perplexity is None and report.backward_transfer is None


def test_data_sets_that_were_seen(tmp_path):
    run(COPAL(), "a", state=tmp_path)
    with pytest.raises(ValueError, match="'a' was used already; leave it out"):
        run(COPAL(), "ab", state=tmp_path)
    with pytest.raises(ValueError, match="calibrations: 'a' differs from the data used before under that name"):
        prune_continually(llama(), {"a": IDS["b"]}, COPAL(), 0.5, state=tmp_path, resume=True, **QUIET)


PADDING = {"input_ids": torch.zeros(1, 8, dtype=torch.int64), "attention_mask": torch.zeros(1, 8, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "smollm2"}, TypeError, "model: expected a transformers model, got str"),
        ({"calibrations": {}}, ValueError, "calibrations: expected at least one dataset, got none"),
        ({"calibrations": IDS["a"]}, TypeError, "calibrations: expected a mapping of names to calibration data, got Tensor"),
        ({"calibrations": {0: IDS["a"]}}, TypeError, "calibrations: expected names of datasets, got 0"),
        ({"calibrations": {"a": []}}, ValueError, r"calibrations\['a'\]: calibration: expected at least one token, got none"),
        (
            {"calibrations": {"a": [PADDING]}},
            ValueError,
            r"calibrations\['a'\]: calibration: expected at least one token, got none",
        ),
        ({"calibrations": {"a": torch.zeros(1, 2)}}, TypeError, r"calibrations\['a'\]: calibration: expected token ids of dtype"),
        ({"strategy": "mask"}, ValueError, "strategy: expected one of 'accumulate', 'dense', 'carry', got 'mask'"),
        ({"method": "best"}, ValueError, "method: expected one of"),
        ({"method": Magnitude(scope="global")}, ValueError, "method: Magnitude.scope='global' looks at all linears at once"),
        ({"method": "sparsellm"}, ValueError, "method: expected one of alps, .* for several datasets, got sparsellm"),
        ({"evaluate": {"z": IDS["a"]}}, ValueError, r"evaluate: expected names of datasets \(a, b\), got 'z'"),
        ({"evaluate": IDS["a"]}, TypeError, "evaluate: expected a mapping of names to token ids, got Tensor"),
        ({"evaluate": {"a": IDS["a"]}}, ValueError, r"evaluate\['a'\]: ids: one window of length 64"),
        ({"evaluate": {"a": IDS["a"]}, "length": 128}, ValueError, "length: expected at most 64"),
        ({"evaluate": {"a": IDS["a"]}, "length": 40}, ValueError, r"evaluate\['a'\]: ids: one window of length 40"),
        ({"resume": True}, ValueError, "resume: expected state, the folder of the run to continue"),
        ({"abandon": True}, ValueError, "abandon: expected state, the folder of the run to continue"),
        ({"seed": -1}, ValueError, "seed: expected a whole number"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, error, message):
    model = llama()
    with pytest.raises(error, match=message):
        prune_continually(**{"model": model, "calibrations": {"a": IDS["a"], "b": IDS["b"]}, **QUIET, **change})
    assert same(model, weights(llama()))


def test_out_must_be_new(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="already holds something else"):
        run(COPAL(), "a", out=tmp_path)


def test_what_gets_no_smaller_is_kept_in_the_state(tmp_path):
    call = {"pattern": 0.08, "out": tmp_path / "out", "state": tmp_path / "state"}
    with pytest.raises(ValueError, match=r"gets smaller .* what is pruned is kept in .*state: resume=True .*format='dense'"):
        run(Magnitude(), "a", format="packed", **call)
    run(Magnitude(), "a", resume=True, **call)
    assert (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ValueError, match="gets smaller .*; the model in memory is pruned"):
        run(Magnitude(), "a", format="packed", pattern=0.08, out=tmp_path / "other")


def test_one_batch_is_enough():
    model = llama()
    report = prune_continually(model, {"a": [IDS["a"][:1]]}, COPAL(), "2:4", **QUIET)
    assert report.steps[0].sparsity == pytest.approx(0.5)
