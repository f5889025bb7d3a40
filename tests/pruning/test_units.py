"""`prune` with K-prune on tiny encoders: scores, budget and targets against brute force, and everything that may go wrong."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import sparsekern
from sparsekern import KPrune
from sparsekern.cli import main
from sparsekern.models.encoder import Encoder
from sparsekern.pruning.batches import as_batches
from sparsekern.pruning.removal import loop as removal
from tests import encoders, tiny

QUIET = dict(progress=False)
FEW_TOKENS = "ignore:.*gram.*:sparsekern.SparsekernWarning"


def prune(model, share=0.5, calibration=None, method=None, **options):
    method = dataclasses.replace(method or KPrune(), remove=share)
    batches = [encoders.padded_ids(), encoders.padded_ids((3, 8, 2), seed=2)] if calibration is None else calibration
    return sparsekern.prune(model, method, None, batches, **QUIET, **options)


@pytest.fixture
def scored(monkeypatch):
    """The scores of every pass, as `search` is given them."""
    passes = []

    def listen(scores, costs, remaining, original=removal.search):
        passes.append(scores)
        return original(scores, costs, remaining)

    monkeypatch.setattr(removal, "search", listen)
    return passes


def masked(model, masks: list[torch.Tensor], sample) -> object:
    """The model's output with the input of each output projection multiplied by a mask."""
    handles = [
        sublayer.out.register_forward_pre_hook(lambda module, args, m=mask: (args[0] * m,))
        for sublayer, mask in zip(Encoder(model).sublayers, masks, strict=True)
    ]
    try:
        return model(**sample)
    finally:
        for handle in handles:
            handle.remove()


def embedding(output) -> torch.Tensor:
    return F.normalize(output.last_hidden_state.mean(1), dim=-1)


def distance(kind: str, student, teacher) -> torch.Tensor:
    if kind == "cosine":
        return 1 - (embedding(student) * embedding(teacher)).sum()
    if kind == "mse":
        return (student.logits - teacher.logits).square().mean()
    p, q = (F.softmax(output.logits / 2, -1) for output in (teacher, student))
    return 4 * (p * (p / q).log()).sum()


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "cosine"), ("bert_classifier", "kl"), ("bert_regression", "mse"), ("distilbert", "cosine")]
)
def test_scores_are_those_of_masks_sample_by_sample(name, kind, scored):
    """Of the second pass, on a model whose first sub-layer was cut, by autograd through the whole model, without padding."""
    model, batch = encoders.tiny(name).double(), encoders.padded_ids()
    teacher, student = copy.deepcopy(model), copy.deepcopy(model)
    method = KPrune(lam_rep=0.0, mu=0.01, tuning=False)  # heads first
    prune(model.float(), 0.45, [batch], method)
    first, head_size = Encoder(student).sublayers[0], Encoder(student).sublayers[0].head_size
    left = model.config.sparsekern_units["heads"][0]
    assert left < first.units
    kept = scored[0][0].argsort(descending=True)[:left]
    gone = torch.ones(first.units, dtype=torch.bool).index_fill(0, kept, False).repeat_interleave(head_size)
    first.out.weight.data[:, gone] = 0

    sublayers = Encoder(student).sublayers
    expected = [torch.zeros(s.units, dtype=torch.float64) for s in sublayers]
    samples = encoders.one_by_one(batch)
    for sample in samples:
        masks = [torch.ones(s.out.in_features, dtype=torch.float64, requires_grad=True) for s in sublayers]
        loss = distance(kind, masked(student, masks, sample), teacher(**sample))
        for total, gradient, sublayer in zip(expected, torch.autograd.grad(loss, masks), sublayers, strict=True):
            total += gradient.square().unflatten(0, (-1, sublayer.head_size)).mean(1) / 2 / len(samples)
    costs = removal.Costs.of(Encoder(student), as_batches([batch], None, torch.device("cpu"), None), "flops")
    for got, sublayer, knowledge in zip(scored[1], sublayers[1:], expected[1:], strict=True):
        scale = (method.mu if sublayer.kind == "heads" else 1.0) / costs.unit(sublayer)
        torch.testing.assert_close(got, knowledge * scale, rtol=2e-3, atol=1e-4 * float(knowledge.max()) * scale)


def test_the_first_pass_takes_the_curvature(scored):
    """There the gradient is zero. With many probes the score comes to what a small step on each mask does to the divergence."""
    model, sample = encoders.tiny("bert_classifier"), encoders.one_by_one(encoders.padded_ids())[1]
    prune(model, 0.3, [{name: value.expand(2000, -1) for name, value in sample.items()}], KPrune(lam_rep=0.0, tuning=False))
    dense = encoders.tiny("bert_classifier").double()
    dense.set_attn_implementation("eager")  # which can be differentiated twice
    teacher, sublayers = dense(**sample), Encoder(dense).sublayers

    def divergence(*masks: torch.Tensor) -> torch.Tensor:
        return distance("kl", masked(dense, list(masks), sample), teacher)

    ones = tuple(torch.ones(s.out.in_features, dtype=torch.float64) for s in sublayers)
    costs = removal.Costs.of(Encoder(dense), as_batches([sample], None, torch.device("cpu"), None), "flops")
    hessian = torch.autograd.functional.hessian(lambda mask: divergence(mask, *ones[1:]), ones[0])
    expected = hessian.diagonal().unflatten(0, (-1, sublayers[0].head_size)).mean(1) / 2
    torch.testing.assert_close(scored[0][0] * costs.heads / 64, expected, rtol=0.15, atol=0.0)


def test_representational_scores_leave_padding_out(scored):
    method = KPrune(lam_pred=0.0, tuning=False)
    prune(encoders.tiny("bert"), 0.5, None, method)
    batches = [encoders.padded_ids(), encoders.padded_ids((3, 8, 2), seed=2)]
    alone = [sample for batch in batches for sample in encoders.one_by_one(batch)]
    prune(encoders.tiny("bert"), 0.5, alone, method)
    for got, want in zip(scored[0], scored[6], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings(FEW_TOKENS)
@pytest.mark.parametrize("name", encoders.MODELS)
@pytest.mark.parametrize("budget", ["flops", "parameters"])
def test_the_budget_is_met_and_not_by_much_more(name, budget):
    model = encoders.tiny(name)
    report = prune(model, 0.4, method=KPrune(budget=budget))
    removed = report.flops_removed if budget == "flops" else report.parameters_removed
    assert 0.4 - 1e-12 <= removed < 0.45
    left = model.config.sparsekern_units
    assert [layer.kept for layer in report.layers if layer.kind == "heads"] == left["heads"]
    assert [layer.kept for layer in report.layers if layer.kind == "neurons"] == left["neurons"]
    assert report.model_parameters[1] == sum(p.numel() for p in model.parameters())
    assert report.model_parameters[0] - report.model_parameters[1] == report.parameters[0] - report.parameters[1]
    assert torch.isfinite(model(**encoders.padded_ids())[0]).all()


@pytest.mark.filterwarnings(FEW_TOKENS)
@pytest.mark.parametrize("name", ["bert", "bert_classifier", "roberta_tokens", "distilbert_answers"])
def test_how_samples_are_batched_does_not_matter(name):
    together = [encoders.padded_ids(), encoders.padded_ids((3, 8, 2), seed=2)]
    alone = [sample for batch in together for sample in encoders.one_by_one(batch)]
    models = [encoders.tiny(name), encoders.tiny(name)]
    reports = [prune(model, 0.5, batches) for model, batches in zip(models, (together, alone), strict=True)]
    assert models[0].config.sparsekern_units == models[1].config.sparsekern_units
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert reports[0].flops == pytest.approx(reports[1].flops) and reports[0].parameters == reports[1].parameters
    errors = [[layer.error for layer in report.layers] for report in reports]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.filterwarnings(FEW_TOKENS)
def test_the_same_seed_gives_the_same_bits_and_leaves_the_generator_alone():
    models = [encoders.tiny("bert") for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        prune(model, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.filterwarnings(FEW_TOKENS)
def test_tuning_brings_the_output_closer():
    errors = {}
    for tuning in (False, True):
        report = prune(encoders.tiny("bert"), 0.5, method=KPrune(tuning=tuning, lam_pred=0.0))
        errors[tuning] = report.layers[-1].error
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.filterwarnings(FEW_TOKENS)
def test_nothing_removed_is_nothing_changed():
    model, expected = encoders.tiny("bert"), encoders.tiny("bert")
    report = prune(model, 0.0)
    assert report.flops_removed == 0 and all(layer.kept == layer.units for layer in report.layers)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_one_sublayer_may_lose_everything(tmp_path):
    model = encoders.tiny("distilbert")
    report = prune(model, 0.94, method=KPrune(tuning=False))
    assert 0 in [layer.kept for layer in report.layers] and any(layer.kept for layer in report.layers)
    sparsekern.save(model, tmp_path / "out")
    loaded, batch = sparsekern.load(tmp_path / "out", device="cpu"), encoders.padded_ids()
    encoders.assert_same_weights(loaded, model)
    torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0])


@pytest.mark.filterwarnings(FEW_TOKENS)
def test_an_interrupted_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    expected = encoders.tiny("bert")
    report = prune(expected)

    def stop(run, index, original=removal.RemovalLoop._decide):
        if index == 3:
            raise KeyboardInterrupt
        return original(run, index)

    model = encoders.tiny("bert")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(removal.RemovalLoop, "_decide", stop)
        prune(model, out=tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), encoders.tiny("bert").parameters(), strict=True))
    with pytest.raises(ValueError, match="holds an unfinished run; pass resume=True"):
        prune(model, out=tmp_path / "out")
    with pytest.raises(ValueError, match="belongs to another run, with another method"):
        prune(model, 0.4, out=tmp_path / "out", resume=True)
    resumed = prune(model, out=tmp_path / "out", resume=True)
    assert resumed.resumed_blocks == 3 and [layer.kept for layer in resumed.layers] == [layer.kept for layer in report.layers]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "report.html",
        "report.json",
    ]
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["results"]["flops"] == list(report.flops) and len(found["layers"]) == 6 and "FLOPs" in str(report)
    page = (tmp_path / "out" / "report.html").read_text()
    facts = [
        f"{resumed.flops_removed:.1%}",
        f"{resumed.model_parameters[1] / 1e6:,.2f} M",
        "Heads and neurons left",
        "All 6 sub-layers",
    ]
    facts += [f"<td>{layer.kept} of {layer.units}</td>" for layer in report.layers]
    assert [fact for fact in facts if fact not in page] == []
    assert resumed.size["saved"] < resumed.size["dense"]


@pytest.mark.parametrize(
    ("share", "options", "message"),
    [
        (0.9999, {}, "KPrune.remove: a share of 0.9999 leaves nothing of this model, expected at most 0.9[45]"),
        (0.5, {"include": "*"}, r"include: expected none, KPrune chooses among all heads and neurons; got '\*'"),
        (0.5, {"patterns": {"*": 0.1}}, "patterns: expected none"),
        (0.5, {"format": "packed"}, "format: expected 'dense', KPrune leaves no zeros to pack; got 'packed'"),
        (0.5, {"report_error": True}, "report_error: KPrune always reports the error of each sub-layer; expected False, got True"),
        (0.5, {"resume": True}, "resume: expected out"),
        (0.5, {"calibration": []}, "calibration: expected at least one token, got none"),
        (0.5, {"calibration": [{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1] * 3, [0] * 3])}]},
         "calibration: sample 1 is all padding, expected at least one token"),
        (0.5, {"calibration": torch.full((1, 3), 200)}, "calibration: expected token ids from 0 to 95, got 200"),
        (0.5, {"method": KPrune(objective="kl")}, "KPrune.objective: expected 'cosine' or 'embedding' for a model without logits"),
    ],
)  # fmt: skip
def test_bad_input_leaves_the_model_as_it_was(share, options, message):
    model = encoders.tiny("bert")
    with pytest.raises(ValueError, match=message):
        prune(model, share, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), encoders.tiny("bert").parameters(), strict=True))
    assert torch.isfinite(model(**encoders.padded_ids())[0]).all()


def test_other_refusals():
    with pytest.raises(ValueError, match="calibration: expected token ids"):
        sparsekern.prune(encoders.tiny("bert"), KPrune())
    for pattern in ("2:4", 0.5):
        with pytest.raises(ValueError, match=f"pattern: expected None, KPrune removes the share KPrune.remove; got '{pattern}'"):
            sparsekern.prune(encoders.tiny("bert"), KPrune(), pattern, encoders.padded_ids())
    with pytest.raises(ValueError, match="LlamaForCausalLM is a decoder"):
        prune(tiny.llama())
    with pytest.raises(ValueError, match="KPrune.objective: expected 'kl' or 'mse' for a model that returns no last hidden state"):
        prune(encoders.tiny("bert_classifier"), method=KPrune(objective="cosine"))
    broken = encoders.tiny("bert")
    broken.encoder.layer[1].intermediate.dense.weight.data[5, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^encoder.layer.1.intermediate.dense: expected finite weights, got nan at \[5, 0\]"):
        prune(broken)
    broken = encoders.tiny("bert")
    broken.encoder.layer[1].attention.output.LayerNorm.bias.data[5] = float("nan")
    with pytest.raises(ValueError, match=r"encoder.layer.1 neurons: x: expected finite values, got nan"):
        prune(broken)
    with pytest.raises(ValueError, match=r"^encoder.layer.0.attention.self.query: expected a float32, .* matrix, got float64"):
        prune(encoders.tiny("bert").double())


def test_an_encoder_that_calls_its_blocks_otherwise():
    config = encoders.tf.DebertaV2Config(**encoders.SIZES)
    message = "^model: expected an encoder .* as BERT.* have them; the blocks of DebertaV2Model are called otherwise .*to unpack"
    with pytest.raises(ValueError, match=message):
        prune(encoders.tf.DebertaV2Model(config).eval())


def test_few_tokens_are_said_once_and_not_where_nothing_is_fitted():
    with pytest.warns(sparsekern.SparsekernWarning) as said:
        prune(encoders.tiny("bert"), 0.1, torch.arange(3, 9)[None], KPrune(ridge=1.0))
    messages = [str(warning.message) for warning in said]
    assert (
        len(messages) == 1
        and "encoder.layer.0 heads: 6 calibration tokens for 32 input features; the Gram matrix is rank-deficient" in messages[0]
    )
    prune(encoders.tiny("bert"), 0.1, torch.arange(3, 9)[None], KPrune(tuning=False))


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_a_model_that_was_cut_before(name):
    """Some of its layers have no heads or no neurons left: no method fails over their empty linears."""
    model = encoders.tiny(name)
    report = prune(model, 0.94, method=KPrune(tuning=False))
    assert 0 in [layer.kept for layer in report.layers]
    with pytest.raises(ValueError, match="model: expected a model with all its heads and neurons, got one that was cut before"):
        prune(model)
    for method in ("magnitude", "wanda", "alps"):
        report = sparsekern.prune(copy.deepcopy(model), method, 0.5, encoders.padded_ids(), **QUIET)
        assert report.layers and all(layer.zeros or layer.shape[1] == 1 for layer in report.layers)


@pytest.mark.filterwarnings(FEW_TOKENS)
def test_one_batch_of_one_token_is_enough_to_run():
    model = encoders.tiny("bert")
    prune(model, 0.5, torch.tensor([[5]]), KPrune(tuning=False))
    assert torch.isfinite(model(**encoders.padded_ids())[0]).all()


@pytest.mark.filterwarnings(FEW_TOKENS)
def test_on_the_command_line(tmp_path, capsys):
    words = tiny.tokenizer()
    words.add_special_tokens({"pad_token": "<pad>"})
    torch.manual_seed(0)
    encoders.tf.BertModel(encoders.tf.BertConfig(**encoders.SIZES | {"vocab_size": len(words)})).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(
        "The quick brown fox jumps over the lazy dog. Every other animal of the wood runs far away. " * 3
    )
    command = ["prune", str(tmp_path / "model"), "--method", "kprune", "--calibration", str(tmp_path / "text.txt")]
    assert main([*command, "--set", "remove=0.5", "--length", "32", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "heads, layer by layer" in shown and "sparsekern.load(" in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    results = report["results"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert results["flops_removed"] >= 0.5 and f"| FLOPs of heads and neurons | {results['flops_removed']:.2%} removed |" in card
    model = sparsekern.load(tmp_path / "out", device="cpu")
    assert sum(p.numel() for p in model.parameters()) == results["model_parameters"][1]
    for wrong, message in (
        (
            ["--pattern", "0.5"],
            "--pattern: expected none, since kprune removes a share of heads and neurons, given by --remove",
        ),
        (["--evaluate"], "perplexity is of causal"),
    ):
        assert main([*command, *wrong, "--out", str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err
