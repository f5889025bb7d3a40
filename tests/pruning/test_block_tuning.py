"""`tune=BlockTuning()`: blocks come closer to the dense model on their masks, never farther; runs resume to the same bits."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn

import sparsekern
from sparsekern import BlockTuning, KPrune, SparsekernWarning, Wanda
from sparsekern.pruning.blockwise import tuned as tuned_blocks
from sparsekern.pruning.blockwise.shelf import Shelf
from sparsekern.pruning.checkpoint import Checkpoint
from sparsekern.pruning.saving import RunFolder
from sparsekern.pruning.session import batches_for
from sparsekern.pruning.tuning import block as tuning
from sparsekern.pruning.windows import with_held_out
from sparsekern.ranks import World
from tests.models.families import COMMON, tiny_ids, tiny_model
from tests.models.zoo import ZOO

from .stack_models import calls, toy
from .unfinished import QUIET, Interrupted, interrupted_run, run

FAST = BlockTuning(passes=3, batch_tokens=32, learning_rate=1e-3)
PAIRS = replace(FAST, blocks=2)


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


def last_error(model) -> float:
    """Return the mean held-out error behind the last of three blocks, from whole models."""
    dense, found = tiny_model("llama"), []
    batches = with_held_out(batches_for(dense, Wanda(), ids(), 1), 0)
    for own in (dense, model):
        handle = own.model.layers[2].register_forward_hook(lambda module, args, output: found.append(output.double()))
        with torch.no_grad():
            own(input_ids=ids())
        handle.remove()
    errors = (found[1] - found[0]).square().sum(-1) / found[0].square().sum(-1)
    return float(errors[[number for number, batch in enumerate(batches) if batch.held_out]].mean())


def test_two_blocks_are_tuned_together():
    """A block changes again with the next one, on its mask, and the hidden states in front of that one with it."""
    tuned, report = prune(tune=PAIRS)
    alone, _ = prune()
    plain, _ = prune(tune=None)
    assert all(row["after"] < row["before"] for row in report.tuning)
    assert report.tuning[2]["after"] == pytest.approx(last_error(tuned), rel=1e-4)
    assert last_error(tuned) < 0.8 * last_error(plain)
    assert report.sparsity == pytest.approx(0.5)
    assert all(torch.equal(zeros(tuned)[name], found) for name, found in zeros(plain).items() if "layers.0." in name)
    assert all(not torch.equal(value, alone.get_parameter(name)) for name, value in tuned.named_parameters() if "layers.0." in name)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_are_counted_without_reading_hidden_states(padded, monkeypatch):
    """They may be on disk, and a mask's sum waits for a GPU."""
    given, seen, get = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}, [], Shelf.get
    if padded:
        given["attention_mask"][::3, :5] = 0

    def count(samples, *arguments, own=tuning._steps):
        with monkeypatch.context() as patched:
            patched.delattr(Shelf, "get")
            steps = own(samples, *arguments)
            seen.append([step.tokens for step in steps[0]])
        return steps

    monkeypatch.setattr(tuning, "_steps", count)
    batches = [{name: values[begin : begin + 4] for name, values in given.items()} for begin in range(0, 24, 4)]
    sparsekern.prune(tiny_model("llama"), "wanda", "2:4", batches, tune=replace(FAST, passes=1, batch_tokens=1), **QUIET)
    assert Shelf.get is get and len(seen) == 3
    held_out = [
        batch.tokens for batch in with_held_out(batches_for(tiny_model("llama"), Wanda(), batches, None), 0) if batch.held_out
    ]
    assert {sum(row) for row in seen} == {24 * 16 - (8 * 5 if padded else 0) - sum(held_out)}


def test_a_block_without_pruned_linears_is_no_partner():
    model, report = prune(tune=PAIRS, exclude=["*layers.1.*"])
    dense = tiny_model("llama")
    assert [row["block"] for row in report.tuning] == [0, 2]
    alone, _ = prune(exclude=["*layers.1.*"])
    assert same(model, alone)
    assert all(torch.equal(value, dense.get_parameter(name)) for name, value in model.named_parameters() if "layers.1." in name)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(tuned_blocks, "tune_block"), (tuned_blocks.BlockTuner, "settle"), (Checkpoint, "save")],
    ids=["tune_block", "settle", "save"],
)
def test_a_failed_pair_is_what_it_was(owner, name, tmp_path, monkeypatch):
    """Wherever it fails, the block is dense again, and its partner as it was tuned before."""
    own, calls = getattr(owner, name), []

    def fail(*arguments):
        found = own(*arguments)
        calls.append(found)
        if len(calls) == 2:
            raise Interrupted
        return found

    model, first = tiny_model("llama"), tiny_model("llama")
    prune(first, include=["*layers.0.*"])
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(Interrupted):
        prune(model, tune=PAIRS, out=tmp_path / "out")
    assert same(model, first)


class Backwards(nn.ModuleList):
    """Blocks that run from the last to the first."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return list(found)[::-1] if isinstance(index, slice) else found


def test_a_finished_run_is_restored_in_the_order_of_the_blocks(tmp_path, monkeypatch):
    """Each block has the weights that it got as a partner, not those of its own turn."""

    def fail(*arguments, **options):
        raise Interrupted

    models = [tiny_model("llama") for _ in range(2)]
    for model in models:
        model.model.layers = Backwards(model.model.layers)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "write", fail)
        prune(models[0], tune=PAIRS, out=tmp_path / "out")
    _, report = prune(models[1], tune=PAIRS, out=tmp_path / "out", resume=True)
    assert report.resumed_blocks == 3 and [row["block"] for row in report.tuning] == [2, 1, 0]
    assert same(*models)


def test_no_process_runs_more_than_one_batch_before_it_hears_of_the_failure_of_another(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "out", monkeypatch, method="magnitude", ids=ids(), blocks=2, tune=PAIRS)
    model, runs = tiny_model("llama"), [0]
    monkeypatch.setattr(World, "check", lambda self: runs.append(0))

    def count(*arguments):
        runs[-1] += 1

    for block in model.model.layers:
        block.register_forward_pre_hook(count)
    _, report = prune(model, "magnitude", tune=PAIRS, out=tmp_path / "out", resume=True)
    assert report.resumed_blocks == 2 and max(runs[1:]) == 2  # the block and its partner


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


@pytest.mark.parametrize(
    ("family", "tune", "blocks"),
    [("llama", FAST, 1), ("gpt2", FAST, 1), ("llama", PAIRS, 1), ("llama", PAIRS, 2), ("llama", PAIRS, 3)],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, family, tune, blocks):
    arguments = {"family": family, "method": "wanda", "ids": ids(), "tune": tune}
    whole, report = run(tmp_path / "whole", **arguments)
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "out", monkeypatch, blocks=blocks, **arguments)
    resumed, again = run(tmp_path / "out", resume=True, **arguments)
    assert again.resumed_blocks == blocks and same(whole, resumed)
    for row, other in zip(report.tuning, again.tuning, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    assert sparsekern.Report.from_json(tmp_path / "out" / "report.json").tuning == again.tuning


@pytest.mark.parametrize("tune", [FAST, PAIRS])
def test_half_precision_resumes_to_the_same_bits(tmp_path, monkeypatch, tune):
    """What is trained in float32 is stored as the model holds it."""
    arguments = {"dtype": torch.bfloat16, "method": "wanda", "ids": ids(), "tune": tune}
    whole, _ = run(tmp_path / "whole", **arguments)
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "out", monkeypatch, blocks=2, **arguments)
    resumed, _ = run(tmp_path / "out", resume=True, **arguments)
    assert same(whole, resumed)


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


@pytest.mark.filterwarnings("ignore:.*stays? dense:sparsekern.SparsekernWarning")
def test_padding_counts_for_nothing_where_blocks_pass_several_streams():
    family, found = ZOO["deepseek_v4"], []
    for calibration in (family.calibration(), family.samples()):  # padded, and one by one
        report = sparsekern.prune(
            family.model(), "magnitude", "2:4", calibration, tune=BlockTuning(passes=1, batch_tokens=10**6), **QUIET
        )
        found.append([[row["before"], row["after"]] for row in report.tuning])
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_a_single_sample_leaves_none_to_judge_on():
    with pytest.raises(ValueError, match="calibration: expected at least 2 samples, of which one is held out"):
        sparsekern.prune(tiny_model("llama"), "wanda", "2:4", tiny_ids(1, 16), tune=FAST, **QUIET)


def test_blocks_that_read_more_than_the_block_before_are_refused():
    with pytest.raises(ValueError, match="tune: expected a model whose blocks take nothing but the output of the one before"):
        sparsekern.prune(toy("skipping"), "magnitude", "2:4", calls(), tune=FAST, **QUIET)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"BlockTuning.passes: expected a whole number of at least 1, got 0"):
        BlockTuning(passes=0)
