"""K-prune's mathematics: scores, search and tuning, each against the slow and obvious way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sparsekern import KPrune
from sparsekern.methods.kprune import predictive_knowledge, search, tuned_projection


def exhaustive(scores: list[torch.Tensor], costs: list[float], remaining: float) -> list[torch.Tensor]:
    """Of all thresholds, the lowest at which what lies above it can be paid for."""
    for threshold in sorted({-math.inf, *torch.cat(scores).tolist()}):
        keep = [s > threshold for s in scores]
        if sum(int(k.sum()) * cost for k, cost in zip(keep, costs, strict=True)) <= remaining:
            return keep
    raise AssertionError("nothing at all costs nothing")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.5, 0.77, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_search_finds_the_lowest_threshold(share, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes, costs = (4, 30, 3, 25), (66.0, 1.0, 66.0, 1.0)
    scores = [torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes]
    total = sum(size * cost for size, cost in zip(sizes, costs, strict=True))
    found = search(scores, costs, (1 - share) * total)
    for got, want in zip(found, exhaustive(scores, costs, (1 - share) * total), strict=True):
        assert torch.equal(got, want)


def test_of_equal_scores_no_more_go_than_must():
    keep = search([torch.ones(3), torch.ones(4)], [2.0, 1.0], 5.0)
    assert [k.tolist() for k in keep] == [[False, False, False], [True] * 4]
    assert all(k.all() for k in search([torch.ones(3) / 3, torch.ones(4)], [0.1, 0.2], 3 * 0.1 + 4 * 0.2))
    assert not any(k.any() for k in search([torch.ones(3)], [1.0], 0.5))
    with pytest.raises(ValueError, match="scores: expected no NaN"):
        search([torch.tensor([1.0, math.nan])], [1.0], 1.0)


@pytest.mark.parametrize("head_size", [1, 4])
def test_predictive_knowledge_is_half_the_squared_gradient_of_a_mask(head_size):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 6, generator=generator, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x @ weight).tanh().square().sum()

    expected = torch.zeros(8 // head_size, dtype=torch.float64)
    for sample in features:
        mask = torch.ones(8, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(sample * mask), mask)
        expected += gradient.square().unflatten(0, (-1, head_size)).mean(1) / 2
    x = features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(predictive_knowledge(x, gradient, head_size), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("extra", [0, 1])
def test_tuning_is_the_ridge_minimiser(extra):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 7, generator=generator) @ torch.randn(7, 7, generator=generator)
    target, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((60, 5), (5, 7), (5,)))
    rows = torch.nn.functional.pad(a, (0, extra), value=1.0)
    missing = target - torch.nn.functional.linear(a, weight, bias)
    new_weight, new_bias = tuned_projection(weight, bias, rows.T @ rows, missing.T @ rows, 0.01)
    shift = 0.01 * (rows.T @ rows).diagonal().double().mean()

    def objective(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        moved = (w - weight.double()).square().sum() + (b - bias.double()).square().sum()
        return (target.double() - torch.nn.functional.linear(a.double(), w, b)).square().sum() + shift * moved

    w, b = (value.double().requires_grad_() for value in (new_weight, new_bias))
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(objective(w, b), [w, b] if extra else [w])])
    assert objective(w, b) < objective(weight.double(), bias.double())
    assert slope.norm() < 1e-4 * (missing.T @ rows).norm()  # which is half the slope before
    assert extra or torch.equal(new_bias, bias)


def test_what_fits_already_is_left_alone():
    a, weight = torch.randn(40, 6), torch.randn(3, 6)
    new_weight, new_bias = tuned_projection(weight, torch.ones(3), a.T @ a, torch.zeros(3, 6), 1e-3)
    assert torch.equal(new_weight, weight) and torch.equal(new_bias, torch.ones(3))


def test_scores_weigh_heads_and_neurons_by_their_cost():
    method = KPrune(lam_pred=2.0, lam_rep=0.5, mu=10.0)
    pred, rep = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 8.0])
    assert method.scores(pred, rep, 5.0, heads=True).tolist() == [8.0, 20.0]
    assert method.scores(pred, rep, 5.0, heads=False).tolist() == [0.8, 2.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "time"}, "KPrune.budget: expected one of 'flops', 'parameters', got 'time'"),
        ({"objective": "accuracy"}, "KPrune.objective: expected one of 'auto', 'kl', 'mse', 'cosine', 'embedding', got 'accuracy'"),
        ({"curvature": "hessian"}, "KPrune.curvature: expected one of 'gradient', 'fisher', got 'hessian'"),
        ({"tuning": "yes"}, "KPrune.tuning: expected True or False, got 'yes'"),
        ({"ridge": -1}, "KPrune.ridge: expected a number of at least 0, got -1"),
        ({"mu": 0}, "KPrune.mu: expected a number above 0, got 0"),
        ({"temperature": math.nan}, "KPrune.temperature: expected a number above 0, got nan"),
        ({"lam_rep": True}, "KPrune.lam_rep: expected a number of at least 0, got True"),
        ({"remove": 1}, "KPrune.remove: expected a number of at least 0 and below 1, got 1"),
        ({"remove": "half"}, "KPrune.remove: expected a number of at least 0 and below 1, got 'half'"),
        ({"lam_pred": 0, "lam_rep": 0}, "expected one of them to be above 0, got 0 and 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        KPrune(**settings)


def test_it_has_a_loop_of_its_own():
    assert not hasattr(KPrune, "solve") and KPrune().needs_data


def test_every_subset_of_equal_cost_is_beaten():
    """With one cost, the units that stay are those of the highest scores: no other choice of as many adds up to more."""
    scores = torch.rand(7, generator=torch.Generator().manual_seed(3))
    (keep,) = search([scores], [1.0], 3.0)
    best = max(sum(scores[list(chosen)]) for chosen in itertools.combinations(range(7), 3))
    assert scores[keep].sum() == pytest.approx(float(best))
