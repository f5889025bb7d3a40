"""Shares of zeros in mixtures: gradients and errors of an expert are those of its own tokens."""

from functools import partial

import pytest
import torch

import sparsekern
from sparsekern.models.experts import watched
from sparsekern.pruning import allocation, gradient_squares
from sparsekern.pruning.allocation import cost_curves
from sparsekern.pruning.batches import as_batches
from sparsekern.pruning.blockwise.experts import experts_in, is_expert
from sparsekern.pruning.plan import make_plan
from tests.models.families import tiny_ids
from tests.models.test_experts import MIXTURES, tiny_mixture

from .expert_oracle import hidden_of
from .test_listed_experts import listed
from .unfinished import QUIET

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(calibration tokens? for|router gates|no calibration token):sparsekern.SparsekernWarning"
)


@pytest.mark.parametrize("kind", MIXTURES)
def test_squares_of_fused_experts_are_those_of_their_weights_gradients(kind, monkeypatch):
    """A sample of one token reaches an expert once, so the gradient of a weight is that of its output times its input."""
    model, ids, calls = tiny_mixture(kind), tiny_ids(9, 1), []
    plan = make_plan(model, 0.5, None, None, None)
    linears = [linear for linear in plan.linears if is_expert(linear)]
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, count, generator: probabilities.argmin(1, keepdim=True))
    with torch.no_grad():
        found = gradient_squares.gradient_squares(model, linears, as_batches(ids, 9, ids.device, None), 0)
    sums, rows = {}, {}
    for sample in ids:
        model.zero_grad()
        with watched(experts_in(linears), lambda experts, call: calls.append((experts, call))):
            log_probabilities = model(sample[None]).logits[0].log_softmax(1)
        (-log_probabilities.min()).backward()
        while calls:
            experts, call = calls.pop()
            for expert, (own, _) in enumerate(call.by_expert(experts.count)):
                for part in experts.parts if len(own) else ():
                    x = call.hidden[own].detach()
                    x = hidden_of(experts.module, expert, x) if part == "down_proj" else x
                    name, gradient = experts.linear_name(expert, part), experts.view(part, experts.parameter(part).grad)[expert]
                    sums[name] = sums.get(name, 0) + gradient.double().square().sum(1) / x.double().square().sum()
                    rows[name] = rows.get(name, 0) + 1
    assert found.keys() == sums.keys() and len(set(rows.values())) > 1
    for name, total in sums.items():
        torch.testing.assert_close(found[name], total / rows[name], rtol=1e-3, atol=1e-14)


def test_squares_of_listed_experts_are_means_over_the_tokens_that_reach_them():
    model, ids = listed(), tiny_ids(4, 8)
    plan = make_plan(model, 0.5, None, None, None)
    linears, reached = [linear for linear in plan.linears if linear.name in plan.listed], {}
    hooks = [
        linear.modules[0].register_forward_hook(
            lambda module, args, output, name=linear.name: reached.update({name: reached.get(name, 0) + len(output)})
        )
        for linear in linears
    ]
    batches = as_batches(ids, 4, ids.device, None)
    with torch.no_grad():
        found = gradient_squares.gradient_squares(model, linears, batches, 0, listed=plan.listed)
        for hook in hooks:
            hook.remove()
        of_all = gradient_squares.gradient_squares(model, linears, batches, 0)
    assert found.keys() == {name for name, rows in reached.items() if rows} and len(set(reached.values())) > 2
    for name, value in found.items():
        torch.testing.assert_close(value * reached[name], of_all[name] * ids.numel())


@pytest.mark.parametrize("make", [partial(tiny_mixture, "qwen3_moe"), partial(tiny_mixture, "llama4"), listed])
def test_zeros_are_shared_out_among_experts(make, monkeypatch):
    """A sample has gradients, and more have errors: experts that only these reach mind as much as the mean of the others."""
    monkeypatch.setattr(gradient_squares, "TOKENS", 1)
    monkeypatch.setattr(gradient_squares, "LENGTH", 2)
    passed = []

    def kept(model, plan, linears, batches, squares, **options):
        passed.append(squares)
        return cost_curves(model, plan, linears, batches, squares, **options)

    monkeypatch.setattr(allocation, "cost_curves", kept)
    report = sparsekern.prune(make(), sparsekern.SparseGPT(scope="matrix"), 0.5, tiny_ids(16, 12), allocation="fisher", **QUIET)
    assert sum(layer.zeros for layer in report.layers) == sum(layer.shape[0] * layer.shape[1] // 2 for layer in report.layers)
    experts = {layer.name: layer.sparsity for layer in report.layers if ".experts." in layer.name}
    assert len(set(experts.values())) > 5 and all(0.348 <= share <= 0.652 for share in experts.values())
    (squares,) = passed
    assert experts.keys() <= squares.keys()
    values = [tuple(squares[name].tolist()) for name in experts]
    assert 1 < len(set(values)) < len(values)  # some are the mean of those that have gradients


def test_shares_behind_the_removal_of_experts_are_those_of_the_smaller_model():
    models, fisher = [tiny_mixture("qwen3_moe") for _ in range(2)], {"allocation": "fisher", **QUIET}
    sparsekern.prune(models[0], sparsekern.ExpertPruning(), 0.5, tiny_ids(), then="wanda", **fisher)
    sparsekern.prune(models[1], sparsekern.ExpertPruning(), calibration=tiny_ids(), **QUIET)
    sparsekern.prune(models[1], "wanda", 0.5, tiny_ids(), **fisher)
    states = [model.state_dict() for model in models]
    assert states[0]["model.layers.0.mlp.experts.down_proj"].shape[0] == 3
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_experts_that_no_token_reaches_keep_their_share():
    ids = tiny_ids(1, 2)
    model = tiny_mixture("qwen3_moe")
    report = sparsekern.prune(model, sparsekern.SparseGPT(scope="matrix"), 0.5, ids, allocation="fisher", **QUIET)
    kept = [layer.zeros * 2 == layer.shape[0] * layer.shape[1] for layer in report.layers]
    assert sum(kept) > 3 and not all(kept)
    assert sum(layer.zeros for layer in report.layers) == sum(layer.shape[0] * layer.shape[1] // 2 for layer in report.layers)
