"""Zeros by linear for a budget: exact, within the ends of the curves, and as cheap as an exhaustive search finds them."""

import itertools
import math

import pytest
import torch

from sparsekern.methods import allocation
from sparsekern.methods.allocation import Curve, allocated_levels, allocated_zeros


def exponential(weights: int, scale: float, growth: float) -> Curve:
    zeros = [round(weights * share) for share in (0.35, 0.425, 0.5, 0.575, 0.65)]
    return Curve(weights, zeros, [scale * math.exp(growth * count / weights) for count in zeros])


def test_the_budget_holds_exactly_and_so_do_the_ends():
    curves = [exponential(1000 + 37 * number, 10.0**number, 5 + number) for number in range(4)]
    lowest, highest = (sum(curve.zeros[end] for curve in curves) for end in (0, -1))
    for budget in (lowest, lowest + 1, (lowest + highest) // 2, highest - 1, highest):
        found = allocated_zeros(curves, budget)
        assert sum(found) == budget
        assert all(curve.zeros[0] <= count <= curve.zeros[-1] for curve, count in zip(curves, found, strict=True))


def test_no_other_division_costs_less():
    curves = [exponential(64, 3.0, 4.0), exponential(64, 1.0, 9.0), exponential(40, 0.2, 7.0)]
    budget = 84

    def cost(counts):
        return sum(
            curve.costs[0] * (curve.costs[-1] / curve.costs[0]) ** ((count - curve.zeros[0]) / (curve.zeros[-1] - curve.zeros[0]))
            for curve, count in zip(curves, counts, strict=True)
        )

    ranges = [range(curve.zeros[0], curve.zeros[-1] + 1) for curve in curves]
    cheapest = min(cost(counts) for counts in itertools.product(*ranges) if sum(counts) == budget)
    assert cost(allocated_zeros(curves, budget)) <= cheapest * (1 + 1e-9)


def test_equal_curves_share_alike_and_an_expensive_one_keeps_its_weights():
    same = allocated_zeros([exponential(1000, 1.0, 5.0)] * 3, 1500)
    assert max(same) - min(same) <= 10  # one step of the curves
    cheap, dear = allocated_zeros([exponential(1000, 1.0, 5.0), exponential(1000, 1e6, 5.0)], 1000)
    assert (cheap, dear) == (650, 350)


def test_costs_of_zero_and_bends_are_no_trouble():
    flat = Curve(100, [10, 20, 30], [0.0, 0.0, 1.0])
    bent = Curve(100, [10, 20, 30], [1.0, 3.0, 3.1])  # the hull leaves the middle out
    assert sum(allocated_zeros([flat, bent], 45)) == 45


def test_a_budget_that_no_division_meets_is_refused():
    for budget in (699, 1301):
        with pytest.raises(ValueError, match=f"budget: expected from 700 to 1,300 zeros, got {budget:,}"):
            allocated_zeros([exponential(1000, 1.0, 5.0)] * 2, budget)


def test_no_other_choice_of_levels_costs_less():
    generator = torch.Generator().manual_seed(0)
    for case in range(20):
        curves, asked = [], []
        for weights in (8, 24, 24, 40, 64)[: 2 + case % 4]:
            levels = [weights // 8 * pruned for pruned in (3, 4, 5, 6)[: 3 + case % 2]]
            curves.append(Curve(weights, levels, torch.rand(len(levels), generator=generator).cumsum(0).tolist()))
            asked.append(levels[1])
        found = allocated_levels(curves, asked)
        costs = {
            choice: sum(curve.costs[curve.zeros.index(zeros)] for curve, zeros in zip(curves, choice, strict=True))
            for choice in itertools.product(*(curve.zeros for curve in curves))
            if sum(choice) == sum(asked)
        }
        assert costs[tuple(found)] == pytest.approx(min(costs.values()), rel=1e-12)


def test_a_narrow_table_of_levels_costs_little_more(monkeypatch):
    """Dear linears come first, so that the zeros so far are far below those asked for, of which the choice near by takes care."""
    sizes = [1 + number * 7 % 13 for number in range(300)]
    dear = [10.0 - number / 30 for number in range(300)]
    curves = [
        Curve(8 * size, [3 * size, 4 * size, 5 * size], [size * cost * factor for factor in (1.0, 1.7, 3.1)])
        for size, cost in zip(sizes, dear, strict=True)
    ]
    asked = [curve.zeros[1] for curve in curves]

    def cost(found):
        assert sum(found) == sum(asked)
        return sum(curve.costs[curve.zeros.index(zeros)] for curve, zeros in zip(curves, found, strict=True))

    best = cost(allocated_levels(curves, asked))
    monkeypatch.setattr(allocation, "CELLS", 0)
    assert best <= cost(allocated_levels(curves, asked)) < best * (1 + 1e-4) < 0.97 * cost(asked)


def test_levels_that_no_near_choice_completes_are_searched_from_those_asked_for(monkeypatch):
    curves = [Curve(80, [30, 40, 50], [0.0, 1.0, 9.0]), Curve(56, [21, 28, 35], [0.0, 1.0, 9.0])]
    monkeypatch.setattr(allocation, "CELLS", 0)
    assert allocated_levels(curves, [40, 28]) == [40, 28]  # 10 and 7 make no other sum of 68
    assert allocated_levels(curves, [50, 21]) == [50, 21]


def test_one_level_each_is_the_only_choice():
    assert allocated_levels([Curve(8, [4], [1.0]), Curve(24, [12], [0.0])], [4, 12]) == [4, 12]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_costs_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match=f"curves: expected finite costs, got {bad}"):
        allocated_levels([Curve(8, [3, 4, 5], [0.0, 1.0, bad]), Curve(8, [3, 4, 5], [0.0, 1.0, 2.0])], [4, 4])
