"""Blocks solved stage by stage, with targets from the dense model, against whole forwards and float64 sums."""

import copy
import itertools

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern.methods.correction import DAMPINGS
from sparsekern.pruning.batches import as_batches
from sparsekern.pruning.windows import with_held_out
from tests.models.families import tiny_ids, tiny_model
from tests.models.test_experts import tiny_mixture

from .stack_models import calls, toy
from .unfinished import QUIET, Interrupted, interrupted_run, run

STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
STREAM_IN_FRONT = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}
FEW = "ignore:.*calibration tokens for:sparsekern.SparsekernWarning"
pytestmark = pytest.mark.filterwarnings(FEW)


@torch.no_grad()
def inputs_of(model, ids, modules: list[nn.Module]) -> list[torch.Tensor]:
    """The first arguments of modules in a forward of the whole model, `[samples, tokens, features]` in float64."""
    found: dict[nn.Module, torch.Tensor] = {}

    def record(module, args, kwargs):
        found.setdefault(module, next(iter((*args, *kwargs.values()))).clone())

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    model(ids)
    for hook in hooks:
        hook.remove()
    return [found[module].double() for module in modules]


def lower(x, weight, dense, lack, held_out):
    """The target by plain least squares: the damping and the shares on a grid that serve the held-out samples best."""
    rows = [part.flatten(0, 1) for part in (x[~held_out], dense[~held_out], lack[~held_out])]
    other = [part.flatten(0, 1) for part in (x[held_out], dense[held_out], lack[held_out])]

    def steps(x, dense, lack, damping):
        gram = x.T @ x
        inverse = torch.linalg.inv(gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
        return [weight @ (dense - x).T @ x @ inverse, lack.T @ x @ inverse]

    lacking = other[0] @ weight.T - other[1] @ weight.T - other[2]
    grid = torch.cartesian_prod(*2 * [torch.linspace(0, 1, 101, dtype=torch.float64)])
    losses = []
    for damping in DAMPINGS:
        effects = torch.stack([lacking, *(other[0] @ step.T for step in steps(*rows, damping))]).flatten(1)
        scales = torch.cat([torch.ones(len(grid), 1), grid], dim=1).double()
        losses.append(((scales @ (effects @ effects.T)) * scales).sum(1))
    best = int(torch.stack(losses).argmin())
    damping, shares = DAMPINGS[best // len(grid)], grid[best % len(grid)]
    own = steps(*(torch.cat(pair) for pair in zip(rows, other, strict=True)), damping)
    return weight + shares[0] * own[0] + shares[1] * own[1]


def kept(target: torch.Tensor) -> torch.Tensor:
    """The two largest of every four."""
    groups = target.abs().unflatten(1, (-1, 4))
    return torch.zeros_like(groups).scatter_(2, groups.topk(2, dim=2).indices, 1).flatten(1).bool()


def held_out_samples(ids) -> torch.Tensor:
    batches = with_held_out(as_batches(ids, 1, ids.device, None), 0)
    return torch.tensor([batch.held_out for batch in batches])


@pytest.mark.parametrize("batch_size", [None, 3])
def test_targets_are_those_of_the_dense_model(batch_size):
    dense, ids = tiny_model("llama"), tiny_ids(16, 16)
    model, oracle = copy.deepcopy(dense), copy.deepcopy(dense)
    sparsekern.prune(model, "magnitude", "2:4", ids, correction="dense", batch_size=batch_size, **QUIET)
    held_out = held_out_samples(ids)
    for index, stage in itertools.product(range(3), STAGES):
        blocks = oracle.model.layers[index], dense.model.layers[index]
        reader = STREAM_IN_FRONT.get(stage[0])
        names = [stage[0], *([] if reader is None else [reader])]
        found = [inputs_of(m, ids, [b.get_submodule(name) for name in names]) for m, b in zip((oracle, dense), blocks, strict=True)]
        (x, *stream), (wanted, *wanted_stream) = found
        for name in stage:
            module = blocks[0].get_submodule(name)
            weight = module.weight.detach().double()
            lack = wanted_stream[0] - stream[0] if stream else x.new_zeros(*x.shape[:2], len(weight))
            target = lower(x, weight, wanted, lack, held_out)
            new = model.model.layers[index].get_submodule(name).weight.detach().double()
            same = (new != 0) == kept(target)
            assert same.double().mean() > 0.98, (index, name)
            torch.testing.assert_close(new[same], (target * kept(target))[same], rtol=0.05, atol=0.02 * float(weight.std()))
            module.weight.data.copy_(new)  # so that rounding does not add up


def test_sequential_takes_the_inputs_that_what_is_pruned_makes():
    model = tiny_model("llama")
    ids, oracle = tiny_ids(), copy.deepcopy(model)
    sparsekern.prune(model, "wanda", "2:4", ids, correction="sequential", **QUIET)
    for block, stage in itertools.product(oracle.model.layers, STAGES):
        (x,) = inputs_of(oracle, ids, [block.get_submodule(stage[0])])
        for name in stage:
            weight = block.get_submodule(name).weight.data
            weight.mul_(kept(weight.double() * x.flatten(0, 1).square().sum(0).sqrt()))
    for name, weight in oracle.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps", "random"])
@pytest.mark.parametrize("correction", ["sequential", "dense"])
def test_methods_that_solve_one_linear_at_a_time(method, correction):
    model = tiny_model("llama")
    report = sparsekern.prune(model, method, 0.5, tiny_ids(), correction=correction, **QUIET)
    assert report.sparsity == pytest.approx(0.5, abs=0.01) and len(report.layers) == 21
    assert all(0 < layer.error < 1 for layer in report.layers)
    assert report.settings["correction"] == correction


def test_the_outputs_come_closer_to_those_of_the_dense_model():
    """On other text, whose tokens follow the same law."""
    ids, other = tiny_ids(64, 32), tiny_ids(16, 32, seed=2)
    logits = {}
    for correction in ("none", "dense"):
        model = tiny_model("llama")
        sparsekern.prune(model, "sparsegpt", 0.6, ids, correction=correction, **QUIET)
        logits[correction] = model(other).logits.detach()
    dense = tiny_model("llama")(other).logits.detach()
    errors = {name: float((found - dense).square().mean()) for name, found in logits.items()}
    assert errors["dense"] < 0.9 * errors["none"]


def test_the_report_says_how_far_each_linear_was_corrected(tmp_path):
    model, ids = tiny_model("llama"), tiny_ids(16, 16)
    report = sparsekern.prune(model, "sparsegpt", "2:4", ids, correction="dense", out=tmp_path / "out", **QUIET)
    for layer in report.layers:
        own = layer.correction
        assert 0 <= own["inputs"] <= 1 and 0 <= own["residual"] <= 1 and own["damping"] in DAMPINGS
        assert own["residual"] == 0 or layer.name.endswith(("o_proj", "down_proj"))
        assert (own["gain"] > 0) == (own["inputs"] > 0 or own["residual"] > 0)
    assert any(layer.correction["gain"] > 0 for layer in report.layers)
    told = report.summary()["correction"]
    assert told.startswith("21 linears corrected, mean share ") and told.endswith(" s") and told in str(report)
    assert sparsekern.Report.from_json(tmp_path / "out" / "report.json") == report
    assert "Correction for inputs" in (tmp_path / "out" / "report.html").read_text()
    assert told in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("correction", ["sequential", "dense"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, correction):
    expected, _ = run(tmp_path / "whole", correction=correction)
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "out", monkeypatch, correction=correction)
    model, report = run(tmp_path / "out", correction=correction, resume=True)
    assert report.resumed_blocks == 1
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    with pytest.raises(Interrupted):
        interrupted_run(tmp_path / "other", monkeypatch, correction=correction)
    with pytest.raises(ValueError, match="with another (calibration, )?correction"):
        run(tmp_path / "other", resume=True)


def test_an_error_leaves_the_block_as_it_was(monkeypatch):
    from sparsekern.pruning.blockwise.solving import Solver

    model, ids = tiny_model("llama"), tiny_ids()
    before, solve = copy.deepcopy(model.state_dict()), Solver.solve

    def fail(self, job, result):
        if "down_proj" in job.linear.name:
            raise ValueError("no")
        solve(self, job, result)

    monkeypatch.setattr(Solver, "solve", fail)
    with pytest.raises(ValueError, match="no"):
        sparsekern.prune(model, "wanda", "2:4", ids, correction="dense", **QUIET)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("correction", ["sequential", "dense"])
def test_several_stacks(correction):
    model = toy("skipping")
    report = sparsekern.prune(model, "wanda", "2:4", calls() + calls(), correction=correction, **QUIET)
    assert report.sparsity == 0.5


@pytest.mark.filterwarnings("ignore:.*router gates:sparsekern.SparsekernWarning")
def test_experts_of_a_mixture_keep_their_own_weights_as_targets():
    model, ids = tiny_mixture("mixtral"), tiny_ids(8, 16)
    report = sparsekern.prune(model, "wanda", "2:4", ids, correction="dense", **QUIET)
    assert report.sparsity == 0.5
    fused = [name for name, _ in model.named_parameters() if "experts" in name]
    dense = dict(tiny_mixture("mixtral").named_parameters())
    for name in fused:
        own = dict(model.named_parameters())[name]
        assert torch.equal(own[own != 0], dense[name][own != 0]), name


def test_a_linear_outside_the_blocks_is_corrected_too():
    model, ids = tiny_model("llama"), tiny_ids()
    sparsekern.prune(model, "magnitude", "2:4", ids, include=["*", "lm_head"], correction="dense", **QUIET)
    dense = tiny_model("llama").lm_head.weight.detach()
    new = model.lm_head.weight.detach()
    assert not torch.equal(new[new != 0], dense[new != 0])


def test_padding_counts_neither_in_the_sums_nor_among_held_out_tokens():
    ids = tiny_ids(16, 16)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    padded, plain = tiny_model("llama"), tiny_model("llama")
    sparsekern.prune(padded, "magnitude", "2:4", [{"input_ids": ids, "attention_mask": mask}], correction="dense", **QUIET)
    sparsekern.prune(plain, "magnitude", "2:4", ids[:, :12], correction="dense", **QUIET)
    for name, weight in plain.state_dict().items():
        own = padded.state_dict()[name]
        same = (own != 0) == (weight != 0)
        assert same.float().mean() > 0.99, name
        torch.testing.assert_close(own[same], weight[same], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("wanda", {"correction": "late"}, "correction: expected one of 'none', 'sequential', 'dense', got 'late'"),
        (
            "sparsellm",
            {"correction": "dense"},
            "correction: expected 'none' for SparseLLM, which does not solve one linear at a time",
        ),
        ("copal", {"correction": "dense"}, "correction: expected 'none' for COPAL, whose statistic is of a weight and its inputs"),
    ],
)
def test_what_cannot_be_corrected_is_refused(method, options, message):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(model, method, "2:4", tiny_ids(), **options, **QUIET)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_one_sample_is_too_few_to_hold_any_out():
    with pytest.raises(ValueError, match="calibration: expected at least 2 samples, of which one is held out to judge on, got 1"):
        sparsekern.prune(tiny_model("llama"), "wanda", "2:4", tiny_ids(1), correction="dense", **QUIET)
