"""`distill=Distill()`: the whole model is trained towards the dense one on its masks; runs resume to the same bits."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import sparsekern
from sparsekern import Distill, SparsekernWarning, Wanda
from sparsekern.data import calibration_ids
from sparsekern.data.own_samples import continued
from sparsekern.pruning.blockwise import loop
from sparsekern.pruning.gradual import training_state
from sparsekern.pruning.session import batches_for
from sparsekern.pruning.tuning import checks, distill, reader, teacher
from sparsekern.pruning.windows import with_held_out
from tests import tiny
from tests.models.families import tiny_ids, tiny_model

from .unfinished import QUIET, Interrupted, run

FAST = Distill(steps=6, batch_tokens=64, learning_rate=3e-4)


def ids():
    return tiny_ids(24, 16)


def prune(model=None, method="wanda", settings=FAST, **arguments):
    model = tiny_model("llama") if model is None else model
    return model, sparsekern.prune(model, method, "2:4", ids(), distill=settings, **QUIET, **arguments)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def held_out_divergence(model, family="llama", temperature=1.0) -> float:
    """The mean over the held-out tokens, in float64, from whole logits."""
    dense = tiny_model(family)
    batches = with_held_out(batches_for(dense, Wanda(), ids(), 1), 0)
    chosen = torch.cat([batch.inputs["input_ids"] for batch in batches if batch.held_out])
    with torch.no_grad():
        wanted, found = (F.log_softmax(m(input_ids=chosen).logits.double() / temperature, -1) for m in (dense, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "phi"])
def test_the_model_comes_closer_to_the_dense_one_on_its_masks(family):
    """Of these, Gemma 2 bounds its logits and Phi's head has a bias: their logits are compared whole."""
    model, report = prune(tiny_model(family))
    plain, _ = prune(tiny_model(family), settings=None)
    curve = report.distillation
    assert curve[0]["kl"] == pytest.approx(held_out_divergence(plain, family), rel=1e-3)
    assert curve[-1]["kl"] == pytest.approx(held_out_divergence(model, family), rel=1e-3)
    assert curve[-1]["kl"] < curve[0]["kl"] and [row["step"] for row in curve] == [0, 2, 4, 6]
    for name, value in model.named_parameters():
        assert not value[plain.get_parameter(name) == 0].any(), name
    embeddings = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    dense = tiny_model(family)
    assert torch.equal(embeddings[0], dense.get_input_embeddings().weight) and torch.equal(
        embeddings[1], dense.get_output_embeddings().weight
    )
    assert "steps of distillation, held-out divergence from" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["results"]["distillation"] == curve


def test_heads_are_found_where_they_are_the_end():
    batch = batches_for(tiny_model("llama"), Wanda(), ids(), 2)[0]
    heads = {family: reader.Reader(tiny_model(family), batch).head for family in ("llama", "gemma2", "phi")}
    assert heads["llama"] is not None and heads["gemma2"] is None and heads["phi"] is None


def test_held_out_samples_beyond_those_that_judge_are_trained_on(monkeypatch):
    batches = with_held_out(batches_for(tiny_model("llama"), Wanda(), ids(), 1), 0)
    assert sum(batch.held_out for batch in batches) == 3
    monkeypatch.setattr(distill, "JUDGED", 17)  # a sample has 16 tokens
    fitted, judged = distill.divided(batches)
    assert judged == [number for number, batch in enumerate(batches) if batch.held_out][:2] and len(fitted) == 22


def test_what_overlaps_with_samples_that_judge_is_not_trained_on(monkeypatch):
    text = tiny_ids(1, 8 * 40 + 40)[0]
    windows = torch.stack([text[begin : begin + 48] for begin in range(0, 8 * 40, 8)])  # each shares 40 tokens with the next
    batches = with_held_out(batches_for(tiny_model("llama"), Wanda(), windows, 1), 0)
    monkeypatch.setattr(distill, "JUDGED", 48)
    fitted, (judge,) = distill.divided(batches)
    assert fitted == [number for number in range(40) if abs(number - judge) > 2]
    with pytest.warns(SparsekernWarning, match="so short that most windows overlap with those that are held out"):
        fitted, _ = distill.divided(with_held_out(batches_for(tiny_model("llama"), Wanda(), windows[:4], 1), 0))
    assert len(fitted) == 3


@pytest.mark.parametrize("room", [None, 0], ids=["memory", "file"])
def test_the_teacher_is_read_once_and_not_copied(monkeypatch, room):
    """Each batch that is used runs through the dense model once, however often its divergence is taken."""
    read = []

    def count(self, batch, own=reader.Reader.read):
        read.append(batch.first_sample)
        return own(self, batch)

    plain, _ = prune(settings=FAST)
    monkeypatch.setattr(teacher, "dense_copy", None)
    if room is not None:
        monkeypatch.setattr(teacher, "copied_bytes", lambda model: room)
    model = tiny_model("llama")
    with monkeypatch.context() as patch:
        patch.setattr(teacher.Reader, "read", count)
        patch.setattr(distill.Distillation, "run", lambda self: None)
        prune(model)
    assert len(read) == len(set(read)) and len(read) <= 24
    assert same(prune()[0], plain)


def test_a_head_that_is_pruned_stays_dense_in_the_teacher():
    model = tiny_model("llama")
    report = sparsekern.prune(model, "wanda", "2:4", ids(), include=["lm_head", "*layers*"], distill=FAST, **QUIET)
    assert (model.lm_head.weight == 0).any()
    assert report.distillation[-1]["kl"] == pytest.approx(held_out_divergence(model), rel=1e-3)


def test_temperature_divides_both_logits():
    plain, _ = prune(settings=None)
    _, report = prune(settings=Distill(steps=1, batch_tokens=32, temperature=2.0, learning_rate=1e-4))
    assert report.distillation[0]["kl"] == pytest.approx(held_out_divergence(plain, temperature=2.0), rel=1e-3)


def test_a_model_that_gets_worse_keeps_its_weights():
    with pytest.warns(SparsekernWarning, match="distillation: the divergence of the held-out samples went from .* are kept"):
        model, _ = prune(settings=Distill(steps=2, batch_tokens=32, learning_rate=0.5, warmup=0))
    assert same(model, prune(settings=None)[0])


def test_it_trains_on_more_windows_of_the_text_than_the_method_has(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(tiny.TEXT, encoding="utf-8")
    tokenizer, seen = tiny.tokenizer(), []
    monkeypatch.setattr(distill, "divided", lambda batches, own=distill.divided, **how: seen.extend(batches) or own(batches, **how))
    settings = Distill(steps=2, batch_tokens=32, samples=16)
    text = {"calibration": tmp_path / "text.txt", "tokenizer": tokenizer, "samples": 4, "length": 8}
    report = sparsekern.prune(tiny.llama(len(tokenizer)), "wanda", "2:4", distill=settings, **text, **QUIET)
    wanted = calibration_ids(tmp_path / "text.txt", tokenizer, samples=16, length=8)
    found = torch.cat([batch.inputs["input_ids"] for batch in seen])
    assert report.calibration_tokens == 4 * 8
    assert sorted(found.tolist()) == sorted(wanted.tolist()) and sum(len(b.inputs["input_ids"]) for b in seen if b.held_out) == 2


def test_it_trains_on_windows_that_the_dense_model_writes(tmp_path, monkeypatch):
    """Each begins with a passage of the text. The dense model writes them, in front of pruning."""
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(tiny.TEXT, encoding="utf-8")
    tokenizer, seen = tiny.tokenizer(), []
    monkeypatch.setattr(distill, "divided", lambda batches, own=distill.divided, **how: seen.extend(batches) or own(batches, **how))
    text = {"calibration": tmp_path / "text.txt", "tokenizer": tokenizer, "samples": 4, "length": 16}
    settings = Distill(steps=2, batch_tokens=32, samples=6, own_samples=10)
    sparsekern.prune(tiny.llama(len(tokenizer)), "wanda", "2:4", distill=settings, **text, **QUIET)
    found = torch.cat([batch.inputs["input_ids"] for batch in seen]).tolist()
    of_text = calibration_ids(tmp_path / "text.txt", tokenizer, samples=6, length=16).tolist()
    passages = calibration_ids(tmp_path / "text.txt", tokenizer, samples=10, length=2)
    written = continued(tiny.llama(len(tokenizer)), passages, length=16, seed=0).tolist()
    assert sorted(found) == sorted(of_text + written)
    seen.clear()
    sparsekern.prune(tiny.llama(len(tokenizer)), "wanda", "2:4", distill=Distill(steps=2, own_samples=10), **text, **QUIET)
    assert sum(len(batch.inputs["input_ids"]) for batch in seen) == 4 + 10
    with pytest.raises(ValueError, match="length: expected at least 8 tokens for windows that go on with a text, got 7"):
        sparsekern.prune(tiny.llama(len(tokenizer)), "wanda", "2:4", distill=settings, **text | {"length": 7}, **QUIET)


def test_a_method_without_data_takes_no_hidden_states_for_the_training(monkeypatch):
    monkeypatch.delattr(loop.Activations, "advance")
    _, report = prune(method="magnitude")
    assert report.distillation[-1]["kl"] < report.distillation[0]["kl"] and "capture" not in report.seconds


def stopped_after(steps: int, monkeypatch):
    """Write the state after each step, and stop the run behind the write of step `steps`."""

    def write(self, checkpoint, done, tensors, own=training_state.TrainingState._write):
        own(self, checkpoint, done, tensors)
        if self.steps_done == steps:
            raise Interrupted

    monkeypatch.setattr(training_state.TrainingState, "_write", write)
    monkeypatch.setattr(training_state, "LEAST_SECONDS", -1.0)
    monkeypatch.setattr(training_state, "MOST_SHARE", 1e9)


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, steps):
    arguments = {"method": "wanda", "ids": ids(), "distill": FAST}
    whole, report = run(tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch:
        stopped_after(steps, patch)
        with pytest.raises(Interrupted):
            run(tmp_path / "out", **arguments)
    resumed, again = run(tmp_path / "out", resume=True, **arguments)
    assert again.resumed_blocks == 3 and same(whole, resumed) and again.distillation == report.distillation
    assert sparsekern.Report.from_json(tmp_path / "out" / "report.json").distillation == again.distillation


def test_a_killed_run_on_text_that_the_model_writes_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "cache"))
    settings = replace(FAST, own_samples=8, mixed_precision=True)
    arguments = {"method": "wanda", "ids": "self:384", "length": 16, "samples": 24, "distill": settings}
    whole, report = run(tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch:
        stopped_after(4, patch)
        with pytest.raises(Interrupted):
            run(tmp_path / "out", **arguments)
    resumed, again = run(tmp_path / "out", resume=True, **arguments)
    assert again.resumed_blocks == 3 and same(whole, resumed) and again.distillation == report.distillation


def test_a_loss_that_is_not_finite_names_the_step(monkeypatch):
    steps = []

    def step(self, lr, clip=None, own=distill.MaskedAdamW.step):
        steps.append(lr)
        return float("nan") if len(steps) == 3 else own(self, lr, clip)

    monkeypatch.setattr(distill.MaskedAdamW, "step", step)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"Distill.learning_rate: expected a finite loss, got nan in step 3 of 6; lower it"):
        prune(model)
    assert same(model, prune(settings=None)[0])


def test_hidden_states_that_are_not_finite_name_the_step():
    settings = Distill(steps=3, batch_tokens=16, learning_rate=1e30, warmup=0)
    with pytest.raises(ValueError, match=r"Distill.learning_rate: expected a finite loss, got nan in step \d of 3; lower it"):
        prune(settings=settings)


def test_half_precision_is_trained_in_float32():
    model, report = prune(tiny_model("llama").bfloat16(), settings=Distill(steps=6, batch_tokens=64, learning_rate=3e-4))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert report.distillation[-1]["kl"] < report.distillation[0]["kl"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"settings": 5}, TypeError, r"distill: expected a config such as Distill\(\), or None, got 5"),
        ({"method": "gradual"}, ValueError, "distill: expected None for Gradual, which leaves no masks block by block"),
        (
            {"settings": Distill(samples=8)},
            ValueError,
            "Distill.samples: expected None unless calibration is a text, got 8 for Tensor",
        ),
        (
            {"settings": Distill(own_samples=8)},
            ValueError,
            "Distill.own_samples: expected None unless calibration is a text, got 8 for Tensor",
        ),
    ],
)
def test_refusals(arguments, error, message):
    model = tiny_model("llama")
    with pytest.raises(error, match=message):
        prune(model, **arguments)
    assert same(model, tiny_model("llama"))


@pytest.mark.parametrize(
    ("dtype", "on_grid", "a_weight"), [("float32", False, 17), ("bfloat16", False, 19), ("bfloat16", True, 23)]
)
def test_the_state_of_training_is_counted(dtype, on_grid, a_weight):
    """Gradient, moments and masters in float32, the weight from before, a mask; embeddings and head are frozen."""
    model = tiny_model("llama").to(getattr(torch, dtype))
    frozen = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
    trained = sum(value.numel() for value in model.parameters()) - frozen
    assert checks.training_bytes(model, on_grid) == a_weight * trained
    assert checks.training_bytes(model, on_grid, leaves=4) == (a_weight + 2 * 4) * trained


@pytest.mark.parametrize(
    ("family", "beside", "what"),
    [
        ("llama", -1, "the state of training"),
        ("llama", 0, "the dense model's hidden states and the state of training"),
        ("gemma2", 0, "a copy of the dense model and the state of training"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, family, beside, what):
    """Where all memory is the host's. Logits that are bounded need a copy."""
    model = tiny_model(family)
    free = checks.training_bytes(model, False) + beside
    monkeypatch.setattr(checks, "free_bytes", lambda device: free)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MemoryError, match=f"distill: expected 0.0 GB for {what}, got 0.0 GB that are free on cpu"):
        prune(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hidden_states_are_no_load_on_a_gpu(monkeypatch):
    """They lie in the memory of the host, and the state of training on the GPU."""
    asked = []
    monkeypatch.setattr(checks, "free_bytes", lambda device: asked.append(str(device)) or 100)
    checks.check_states(torch.device("cuda", 1), 100, 10**9)
    with pytest.raises(MemoryError, match="for the dense model's hidden states, got 0.0 GB that are free on cpu"):
        checks.check_states(torch.device("cuda", 1), 101, 10**9)
    assert asked == ["cpu", "cpu"]
    with pytest.raises(MemoryError, match="hidden states and the state of training"):
        checks.check_states(torch.device("cpu"), 100, 1)


def test_a_model_that_predicts_no_tokens_is_refused():
    config = tf.BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    with pytest.raises(ValueError, match="distill: expected None for a model that predicts no next tokens, got Distill"):
        sparsekern.prune(tf.BertModel(config).eval(), "magnitude", "2:4", ids(), distill=FAST, **QUIET)
