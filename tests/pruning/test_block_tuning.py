"""`tune=BlockTuning()`: blocks come closer to the dense model on their masks, never farther; runs resume to the same bits."""

import copy

import pytest
import torch
import transformers as tf

import sparsekern
from sparsekern import BlockTuning, KPrune, SparsekernWarning, Wanda
from sparsekern.pruning.blockwise import tuned as tuned_blocks
from sparsekern.pruning.session import batches_for
from sparsekern.pruning.tuning import block as tuning
from sparsekern.pruning.windows import with_held_out
from tests.models.families import COMMON, tiny_ids, tiny_model

from .stack_models import calls, toy
from .unfinished import QUIET, Interrupted, interrupted_run, run

FAST = BlockTuning(passes=3, batch_tokens=32, learning_rate=1e-3)


def ids():
    return tiny_ids(24, 16)


def prune(model=None, method="wanda", tune=FAST, pattern="2:4", **arguments):
    model = tiny_model("llama") if model is None else model
    return model, sparsekern.prune(model, method, pattern, ids(), tune=tune, **QUIET, **arguments)


def mixtral():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**COMMON, **shape, num_local_experts=4)).eval()


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: value == 0 for name, value in model.named_parameters() if ".layers." in name}


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_blocks_come_closer_to_the_dense_model_on_their_masks(method):
    tuned, report = prune(method=method)
    plain, _ = prune(method=method, tune=None)
    assert len(report.tuning) == 3 and all(row["after"] < row["before"] for row in report.tuning)
    assert all(torch.equal(zeros(tuned)[name], found) for name, found in zeros(plain).items() if "layers.0." in name)
    assert report.sparsity == pytest.approx(0.5)
    dense = tiny_model("llama")
    with torch.no_grad():
        wanted, before, after = (model(input_ids=ids()).logits for model in (dense, plain, tuned))
    assert (after - wanted).norm() < 0.95 * (before - wanted).norm()
    changed = {name for name, value in tuned.named_parameters() if not torch.equal(value, dense.get_parameter(name))}
    assert "model.embed_tokens.weight" not in changed and "model.layers.1.input_layernorm.weight" in changed
    assert "blocks tuned, mean held-out error from" in str(report)


def test_the_error_is_that_of_the_held_out_hidden_states():
    """The reported errors, computed once more from whole models."""
    outputs: dict[str, torch.Tensor] = {}
    dense = tiny_model("llama")
    tuned, report = prune()
    for name, model in (("dense", dense), ("tuned", tuned)):
        with torch.no_grad():
            outputs[name] = model(input_ids=ids(), output_hidden_states=True).hidden_states[2].double()  # behind block 1
    errors = (outputs["tuned"] - outputs["dense"]).square().sum(-1) / outputs["dense"].square().sum(-1)
    batches = with_held_out(batches_for(dense, Wanda(), ids(), 1), 0)
    held_out = [number for number, batch in enumerate(batches) if batch.held_out]
    assert len(held_out) == 3
    assert report.tuning[1]["after"] == pytest.approx(float(errors[held_out].mean()), rel=1e-4)


def test_a_block_that_gets_worse_keeps_the_weights_of_the_method():
    tuned, report = prune(tune=BlockTuning(passes=1, batch_tokens=16, learning_rate=0.3))
    assert all(row["after"] <= row["before"] for row in report.tuning)
    assert all(row["after"] == row["before"] for row in report.tuning) and same(tuned, prune(tune=None)[0])


def test_a_loss_that_is_not_finite_names_block_and_step(monkeypatch):
    """The block keeps the weights of the method, and the next one is tuned."""
    steps = []

    def step(self, lr, clip=None, own=tuning.MaskedAdamW.step):
        steps.append(lr)
        return float("nan") if len(steps) == 3 else own(self, lr, clip)

    monkeypatch.setattr(tuning.MaskedAdamW, "step", step)
    with pytest.warns(
        SparsekernWarning, match=r"model\.layers\.0: the loss of step 3 is nan, so it keeps the weights of the method"
    ):
        tuned, report = prune()
    first, second, _ = report.tuning
    assert first["after"] == first["before"] and first["steps"] == 2 and second["after"] < second["before"]
    plain, _ = prune(tune=None)
    assert all(torch.equal(value, plain.get_parameter(name)) for name, value in tuned.named_parameters() if "layers.0." in name)


def test_a_failed_block_is_dense_again(monkeypatch):
    def fail(*arguments):
        raise Interrupted

    model = tiny_model("llama")
    monkeypatch.setattr(tuned_blocks, "tune_block", fail)
    with pytest.raises(Interrupted):
        prune(model)
    assert same(model, tiny_model("llama"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, family):
    arguments = {"family": family, "method": "wanda", "ids": ids(), "tune": FAST}
    whole, report = run(tmp_path / "whole", **arguments)
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "out", monkeypatch, **arguments)
    resumed, again = run(tmp_path / "out", resume=True, **arguments)
    assert again.resumed_blocks == 1 and same(whole, resumed)
    for row, other in zip(report.tuning, again.tuning, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    assert sparsekern.Report.from_json(tmp_path / "out" / "report.json").tuning == again.tuning


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "out", monkeypatch, ids=ids(), tune=FAST)
    with pytest.raises(ValueError, match="with another .*tune"):
        run(tmp_path / "out", resume=True, ids=ids(), tune=BlockTuning())


def test_experts_are_tuned_on_their_masks():
    tuned, report = prune(mixtral())
    plain, _ = prune(mixtral(), tune=None)
    assert all(row["after"] < row["before"] for row in report.tuning)
    kept = zeros(plain)
    for name, found in zeros(tuned).items():
        if "layers.0." in name:
            assert torch.equal(found, kept[name]), name
    gate = "model.layers.0.mlp.gate.weight"
    assert torch.equal(tuned.get_parameter(gate), mixtral().get_parameter(gate))


def test_half_precision_is_trained_in_float32_and_judged_rounded():
    model, report = prune(tiny_model("llama").bfloat16())
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert all(row["after"] <= row["before"] for row in report.tuning) and any(
        row["after"] < row["before"] for row in report.tuning
    )
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


def test_padding_is_left_out():
    """What stands at padded positions changes nothing."""
    found = []
    for filler in (3, 7):
        batches = [{"input_ids": tiny_ids(2, 12, seed), "attention_mask": torch.ones(2, 12, dtype=torch.long)} for seed in range(4)]
        for batch in batches:
            batch["attention_mask"][1, 9:] = 0
            batch["input_ids"][1, 9:] = filler
        model = tiny_model("llama")
        sparsekern.prune(model, "wanda", "2:4", copy.deepcopy(batches), tune=FAST, **QUIET)
        found.append(model)
    for one, other in zip(*(model.parameters() for model in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tune": True}, TypeError, r"tune: expected a config such as BlockTuning\(\), or None, got True"),
        ({"tune": FAST, "method": "gradual"}, ValueError, "tune: expected None for Gradual, which leaves no masks block by block"),
        ({"tune": FAST, "method": KPrune(), "pattern": None}, ValueError, "tune: expected None for KPrune"),
    ],
)
def test_refusals(arguments, error, message):
    model = tiny_model("llama")
    with pytest.raises(error, match=message):
        prune(model, **arguments)
    assert same(model, tiny_model("llama"))


def test_a_single_sample_leaves_none_to_judge_on():
    with pytest.raises(ValueError, match="calibration: expected at least 2 samples, of which one is held out"):
        sparsekern.prune(tiny_model("llama"), "wanda", "2:4", tiny_ids(1, 16), tune=FAST, **QUIET)


def test_blocks_that_read_more_than_the_block_before_are_refused():
    with pytest.raises(ValueError, match="tune: expected a model whose blocks take nothing but the output of the one before"):
        sparsekern.prune(toy("skipping"), "magnitude", "2:4", calls(), tune=FAST, **QUIET)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"BlockTuning.passes: expected a whole number of at least 1, got 0"):
        BlockTuning(passes=0)
