"""`prune` with `Gradual`: it trains, its zeros hold, it resumes to the same bits, and it refuses what it cannot train."""

import copy
import json
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors import safe_open

import sparsekern
from sparsekern import Gradual, Magnitude
from sparsekern.pruning import progress
from sparsekern.pruning.gradual import training_state
from sparsekern.pruning.gradual.interrupt import interrupt_deferred
from sparsekern.pruning.gradual.loop import GradualLoop
from tests import tiny
from tests.models.families import COMMON, tiny_ids, tiny_model

FAST = Gradual(steps=2, train_steps=3, batch_tokens=40, learning_rate=3e-3, weight_decay=0.1)


def prune(model=None, method=FAST, pattern=0.5, ids=None, **arguments):
    model = tiny_model("llama") if model is None else model
    calibration = tiny_ids(4, 16) if ids is None else ids
    report = sparsekern.prune(model, method, pattern, calibration, progress=False, batch_size=2, **arguments)
    return model, report


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def loss_of(model, ids) -> float:
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_training_lowers_the_loss_and_keeps_the_zeros():
    words = tiny.tokenizer()(tiny.TEXT)["input_ids"]
    ids = torch.tensor(words[: len(words) // 16 * 16]).view(-1, 16)
    pruned, _ = prune(tiny.llama(), Magnitude(), 0.7, ids)
    method = Gradual(steps=3, epochs=2, batch_tokens=64, learning_rate=1e-2)
    trained, report = prune(tiny.llama(), method, 0.7, ids)
    assert report.sparsity == pytest.approx(0.7, abs=1e-3)
    assert loss_of(trained, ids) < 0.5 * loss_of(pruned, ids)
    curve = report.training
    assert [entry["step"] for entry in curve] == sorted(entry["step"] for entry in curve)
    assert [round(entry["sparsity"], 2) for entry in curve][:: len(curve) // 3] == [0.49, 0.67, 0.70]
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    assert "optimizer steps, loss of their batches from" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["results"]["training"] == curve


def test_one_step_is_adamw_on_the_mean_loss_of_the_next_token():
    """Against a loop of one's own: two batches with padding are one optimizer step on the mean over their real tokens."""
    batches = [{"input_ids": tiny_ids(2, 8, seed), "attention_mask": torch.ones(2, 8, dtype=torch.long)} for seed in (1, 2)]
    batches[0]["attention_mask"][0, 5:] = 0
    batches[1]["attention_mask"][1, :2] = 0
    method = Gradual(steps=1, train_steps=1, batch_tokens=1000, learning_rate=1e-3, warmup=0, clip=1e9, weight_decay=0.5)
    model, report = prune(method=method, ids=copy.deepcopy(batches))

    expected, _ = prune(method="magnitude")
    keeper = sparsekern.keep_sparsity(expected)
    decayed = [{"params": [value], "weight_decay": 0.5 if value.dim() == 2 else 0.0} for value in expected.parameters()]
    optimizer = torch.optim.AdamW(decayed, lr=1e-3)
    total, count = 0, 0
    for batch in batches:
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        likelihood = F.log_softmax(expected(**batch).logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        wanted = real[:, 1:] & real[:, :-1]
        total, count = total - likelihood[wanted].sum(), count + int(wanted.sum())
    (total / count).backward()
    optimizer.step()
    keeper.remove()
    assert report.training[0]["loss"] == pytest.approx(float((total / count).detach()), rel=1e-5)
    for (name, value), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        # Adam's first step is the sign of the gradient: where that is nothing but rounding, so is the step
        assert ((value - reference).abs() < 1e-5).double().mean() > 0.99, name


def test_the_learning_rate_rises_and_falls_in_equal_steps():
    _, report = prune(method=Gradual(steps=1, train_steps=6, batch_tokens=1, learning_rate=1e-3, warmup=0.5))
    rates = [step["learning_rate"] for step in report.training]
    assert rates == pytest.approx([1e-3 * share for share in (1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3)])


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_n_of_m(pattern):
    model, report = prune(pattern=pattern, method=Gradual(steps=3, train_steps=1))
    n, m = map(int, pattern.split(":"))
    weight = model.model.layers[1].mlp.down_proj.weight
    assert ((weight.unflatten(1, (-1, m)) != 0).sum(-1) == n).all()
    assert {layer.pattern for layer in report.layers} == {pattern}


@pytest.mark.parametrize("criterion", ["random", "structured", Magnitude(scope="global")])
def test_every_criterion_step_by_step(criterion):
    """Without training the steps end where one step does: zeros of earlier steps go first, and are the smallest."""
    gradual, report = prune(method=Gradual(criterion, steps=3, epochs=0), ids=None)
    at_once, single = prune(method=criterion)
    assert same(gradual, at_once) and report.sparsity == single.sparsity and not report.training
    trained, report = prune(method=Gradual(criterion, steps=2, train_steps=1))
    assert report.sparsity == pytest.approx(single.sparsity, abs=0.1) and not same(trained, at_once)


def test_needs_no_calibration_where_it_does_not_train():
    model = tiny_model("llama")
    sparsekern.prune(model, Gradual(epochs=0), 0.5, progress=False)
    assert same(model, prune(method="magnitude")[0])


@pytest.mark.parametrize("dtype, rate", [(torch.bfloat16, 4e-5), (torch.float16, 5e-6)])
def test_half_precision_has_float32_masters(dtype, rate):
    model = tiny_model("llama", dtype)
    inv_freq, before = model.model.rotary_emb.inv_freq.clone(), model.model.layers[0].mlp.up_proj.weight.detach().float()
    prune(model, Gradual(steps=1, train_steps=8, learning_rate=rate, warmup=0))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.model.rotary_emb.inv_freq, inv_freq)
    after = model.model.layers[0].mlp.up_proj.weight.detach().float()
    spacing = torch.finfo(dtype).eps * torch.exp2(before.abs().log2().floor())
    lost = (rate < spacing / 2) & (after != 0)  # where each step by itself, at most `rate` long, would be rounded away
    assert (after != before)[lost].any()


def test_frozen_parameters_stay_and_modes_are_put_back():
    model = tiny_model("llama").train()
    model.lm_head.requires_grad_(False)
    head, embedding = model.lm_head.weight.clone(), model.model.embed_tokens.weight.clone()
    model.model.norm.eval()
    prune(model)
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.training and not model.model.norm.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    model, state = tiny_model("gpt2"), torch.get_rng_state()  # it has dropout
    prune(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, prune(tiny_model("gpt2"), seed=1)[0]) and not same(model, prune(tiny_model("gpt2"), seed=2)[0])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("family, survived", [("gpt2", 1), ("gpt2", 4), ("gpt2", 6), ("llama_tied", 3), ("llama_tied", 8)])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, family, survived):
    """Killed after one of the eight files of a run: three optimizer steps, the end of a pruning step, and again."""
    written = 0

    def write(self, *arguments, write=training_state.TrainingState._write):
        nonlocal written
        write(self, *arguments)
        written += 1
        if written == survived:
            raise Killed

    monkeypatch.setattr(training_state, "LEAST_SECONDS", -1)
    monkeypatch.setattr(training_state, "MOST_SHARE", float("inf"))
    whole, report = prune(tiny_model(family))
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training_state.TrainingState, "_write", write)
        prune(tiny_model(family), out=out)
    resumed, again = prune(tiny_model(family), out=out, resume=True)
    assert same(whole, resumed) and again.training == report.training and again.layers == report.layers
    assert not (out / "checkpoint").exists()
    assert same(tf.AutoModelForCausalLM.from_pretrained(out), whole)


@pytest.fixture
def ctrl_c():
    """It interrupts, even where the tests are a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_the_step_at_hand(tmp_path, monkeypatch):
    def press(self, text, done=progress.Progress.step_done):
        done(self, text)
        if text.startswith("step 2"):
            signal.raise_signal(signal.SIGINT)

    whole, report = prune()
    out, before = tmp_path / "out", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress.Progress, "step_done", press)
        prune(out=out)
    assert signal.getsignal(signal.SIGINT) == before
    with safe_open(out / "checkpoint" / "training.safetensors", "pt") as file:
        state = json.loads(file.metadata()["note"])
    assert (state["done"], state["steps_done"], len(state["curve"])) == (1, 1, 4)
    resumed, again = prune(out=out, resume=True)
    assert same(whole, resumed) and again.training == report.training


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_run_that_does_not_train(monkeypatch):
    pruned = []

    def press(self, step, prune=GradualLoop._prune):
        signal.raise_signal(signal.SIGINT)
        prune(self, step)
        pruned.append(step)

    monkeypatch.setattr(GradualLoop, "_prune", press)
    with pytest.raises(KeyboardInterrupt):
        prune(method=Gradual(steps=3, epochs=0))
    assert pruned == [1]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_last_step_is_stored_is_not_lost(tmp_path, monkeypatch):
    def press(self, step, finish=training_state.TrainingState.finish_step):
        finish(self, step)
        if step == FAST.steps:
            signal.raise_signal(signal.SIGINT)

    whole, report = prune()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_state.TrainingState, "finish_step", press)
        prune(out=tmp_path)
    resumed, again = prune(out=tmp_path, resume=True)
    assert same(whole, resumed) and again.training == report.training


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), interrupt_deferred() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_stays_ignored_and_other_threads_alone(ctrl_c):
    with ThreadPoolExecutor(1) as threads, interrupt_deferred():
        threads.submit(lambda: interrupt_deferred().__enter__()).result()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupt_deferred() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert not interrupted()


def test_a_damaged_file_and_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(
        training_state.TrainingState, "finish_step", lambda self, step: (self._write(self._checkpoint, step, {}), 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        prune(out=tmp_path / "out")
    with pytest.raises(ValueError, match="belongs to another run, with another method"):
        prune(method=Gradual(steps=3), out=tmp_path / "out", resume=True)
    (tmp_path / "out" / "checkpoint" / "training.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="training.safetensors is damaged .*; remove it to redo its part of the run"):
        prune(out=tmp_path / "out", resume=True)


def masked_language_model():
    return tf.BertForMaskedLM(
        tf.BertConfig(**COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


PADDING = {"input_ids": tiny_ids(2, 8), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
ALONE = {"input_ids": tiny_ids(2, 8), "attention_mask": torch.eye(2, 8, dtype=torch.long)}


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (None, {"ids": []}, "calibration: expected at least one token, got none"),
        (None, {"ids": [PADDING]}, "calibration: expected at least one token, got none"),
        (
            None,
            {"ids": tiny_ids(4, 1)},
            "calibration: Gradual predicts tokens from those before, so it needs samples of at least two",
        ),
        (None, {"ids": [ALONE]}, "calibration: Gradual predicts tokens .* at least two tokens, got none"),
        (masked_language_model, {}, "Gradual trains causal language models, but in BertForMaskedLM the logits of a token change"),
        (lambda: masked_language_model().bert, {}, "Gradual trains causal .* but BertModel returns no logits for each token"),
        (lambda: tiny_model("llama").requires_grad_(False), {}, "model: .* none of its parameters requires a gradient"),
        (None, {"report_error": True}, "report_error: Gradual has no errors of layers to report"),
        (None, {"method": Gradual("structured"), "pattern": "2:4"}, "pattern: expected a sparsity for Structured"),
        (
            None,
            {"method": Gradual(train_steps=9, learning_rate=1e30, clip=1e30)},
            "Gradual.learning_rate: expected a finite loss, got (nan|inf) after",
        ),
    ],
)
def test_bad_input(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        prune(model and model(), **arguments)


@pytest.mark.parametrize(
    "dtype, rate, when",
    [(torch.float16, 1e5, "1 optimizer steps, rounded to the model's dtype"), (torch.float32, 1e38, "1 optimizer steps")],
)
def test_weights_that_the_last_step_makes_infinite(tmp_path, dtype, rate, when):
    """The loss of a step is from before it, so that of the last one says nothing."""
    method = Gradual(steps=1, train_steps=1, learning_rate=rate, warmup=0)
    with pytest.raises(
        ValueError, match=rf"Gradual.learning_rate: expected finite weights, got \S+ in model\.\S+ after {when}; lower it"
    ):
        prune(tiny_model("llama", dtype), method, out=tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_weight_that_is_infinite_before_training():
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[2, 5] = float("inf")  # a token that no sample holds
    with pytest.raises(ValueError, match="model: expected finite weights to train, got inf in model.embed_tokens.weight"):
        prune(model)


def test_no_calibration():
    with pytest.raises(ValueError, match="calibration: expected token ids, which Gradual needs"):
        sparsekern.prune(tiny_model("llama"), "gradual", 0.5, progress=False)


@pytest.mark.parametrize(
    "ids", [tiny_ids(1, 16), [PADDING, {"input_ids": tiny_ids(1, 16)}]], ids=["one batch", "one of padding only"]
)
def test_a_single_batch_will_do(ids):
    _, report = prune(method=Gradual(steps=2, epochs=3), ids=ids)
    assert len(report.training) == 6
