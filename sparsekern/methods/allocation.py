"""Shares of zeros by linear, or the N of N:M, for a number of zeros that holds exactly: where one more zero costs least, there it goes.

The cost of a linear is what its error adds to the KL divergence from the dense model, to second order: the squared error of each output
times the mean square of the loss's gradient there (the diagonal of the Fisher information).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

UNIFORM, FISHER, MIXED = "uniform", "fisher", "mixed"  # the last also mixes the N of N:M
ALLOCATIONS = (UNIFORM, FISHER, MIXED)
CELLS, WIDEST = 1 << 25, 1 << 20  # of the table that `allocated_levels` keeps: in all, and by a linear to each side
NEAR = 2  # times the largest step, what that table reaches in any case
POINTS = 64  # of each curve, between its levels
TINY = 1e-30  # of a cost, whose logarithm is taken


@dataclass(frozen=True)
class Curve:
    """The cost of one linear by its number of zeros.

    Attributes:
        weights: number of its weights.
        zeros: numbers of zeros, ascending.
        costs: the cost of each.
    """

    weights: int
    zeros: Sequence[int]
    costs: Sequence[float]


@dataclass(frozen=True)
class _Step:
    """Some more zeros of one linear. All costs of a convex curve rise from step to step."""

    slope: float
    linear: int
    place: int
    zeros: int


def allocated_zeros(curves: Sequence[Curve], budget: int) -> list[int]:
    """Return the number of zeros of each linear that cost least together, within the ends of the curves.

    Between its levels a cost is interpolated by its logarithm. The convex hull of each curve is taken, so the steps of all linears in
    the order of their slopes are the least of the total for every budget.

    Args:
        curves: the cost of each linear.
        budget: the sum of all zeros.

    Raises:
        ValueError: the curves begin above the budget, or end below it.
    """
    found = [curve.zeros[0] for curve in curves]
    most = sum(curve.zeros[-1] for curve in curves)
    if not sum(found) <= budget <= most:
        raise ValueError(f"budget: expected from {sum(found):,} to {most:,} zeros, got {budget:,}")
    left = budget - sum(found)
    steps = [step for number, curve in enumerate(curves) for step in _steps(number, _points(curve))]
    for step in sorted(steps, key=lambda step: (step.slope, step.linear, step.place)):
        taken = min(step.zeros, left)
        found[step.linear] += taken
        left -= taken
    return found


def allocated_levels(curves: Sequence[Curve], asked: Sequence[int]) -> list[int]:
    """Return for each linear one of the numbers of zeros of its curve, so that they sum to those asked for and cost the least.

    The convex hulls of the curves give a choice that is short of the sum by less than one step. From there a table holds, linear by
    linear, the least cost of every difference between that choice and another. Where it would have more than `CELLS` cells, differences
    of more than `NEAR` times the largest step are left out.

    Args:
        curves: the cost of each linear, at the only numbers of zeros that it can have.
        asked: for each linear one of these numbers.

    Raises:
        ValueError: a cost is NaN or Inf.
    """
    budget = sum(asked)
    if bad := [cost for curve in curves for cost in curve.costs if not math.isfinite(cost)]:
        raise ValueError(f"curves: expected finite costs, got {bad[0]}")
    found = _best_near(_near(curves, budget), curves, budget)
    if found is None:  # no choice near by has the sum; those asked for have it
        found = _best_near(asked, curves, budget)
    assert found is not None
    return found


def _near(curves: Sequence[Curve], budget: int) -> list[int]:
    """Return levels of little cost whose sum is at most the budget."""
    found = [curve.zeros[0] for curve in curves]
    left = budget - sum(found)
    steps = [step for number, curve in enumerate(curves) for step in _steps(number, zip(curve.zeros, curve.costs, strict=True))]
    for step in sorted(steps, key=lambda step: (step.slope, step.linear, step.place)):
        if found[step.linear] == step.place and step.zeros <= left:
            found[step.linear] += step.zeros
            left -= step.zeros
    return found


def _best_near(starts: Sequence[int], curves: Sequence[Curve], budget: int) -> list[int] | None:
    """Return the levels of least cost with the sum `budget`, as far as the table reaches from some levels; None where there are none."""
    steps = [[zeros - start for zeros in curve.zeros] for curve, start in zip(curves, starts, strict=True)]
    missing = budget - sum(starts)
    unit = math.gcd(missing, *(step for own in steps for step in own)) or 1
    steps = [[step // unit for step in own] for own in steps]
    sizes = [max(map(abs, own)) for own in steps]
    reach = min(sum(sizes), max(NEAR * max(sizes), min(CELLS // (2 * len(steps)), WIDEST)))
    least = torch.full((2 * reach + 1,), math.inf, dtype=torch.float64, device="cpu")
    least[reach] = 0.0
    choices: list[torch.Tensor] = []
    for own, curve in zip(steps, curves, strict=True):
        costs = torch.stack([_shifted(least, step) + cost for step, cost in zip(own, curve.costs, strict=True)])
        least, chosen = costs.min(0)
        choices.append(chosen.to(torch.uint8))
    found, place = [], reach + missing // unit
    if math.isinf(float(least[place])):
        return None
    for own, curve, chosen in zip(reversed(steps), reversed(curves), reversed(choices), strict=True):
        level = int(chosen[place])
        found.append(curve.zeros[level])
        place -= own[level]
    return found[::-1]


def _shifted(values: torch.Tensor, step: int) -> torch.Tensor:
    """Return values `[n]` moved by `step` places, with Inf where none was."""
    found = torch.full_like(values, math.inf)
    left = max(len(values) - abs(step), 0)
    if step < 0:
        found[:left] = values[len(values) - left :]
    else:
        found[len(values) - left :] = values[:left]
    return found


def _points(curve: Curve) -> list[tuple[int, float]]:
    """Return numbers of zeros between the ends of a curve, and the cost of each."""
    first, last = curve.zeros[0], curve.zeros[-1]
    zeros = sorted({first + round((last - first) * place / (POINTS - 1)) for place in range(POINTS)})
    return [(count, _cost(curve, count)) for count in zeros]


def _steps(number: int, points: Iterable[tuple[int, float]]) -> list[_Step]:
    """Return the steps between the corners of the convex hull below some points."""
    corners: list[tuple[int, float]] = []
    for point in points:
        while len(corners) > 1 and _slope(corners[-1], point) <= _slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(point)
    return [_Step(_slope(a, b), number, a[0], b[0] - a[0]) for a, b in pairwise(corners)]


def _cost(curve: Curve, zeros: int) -> float:
    """Return the cost of a number of zeros, by the logarithms of the two levels around it."""
    after = min(max(bisect_right(curve.zeros, zeros), 1), len(curve.zeros) - 1)
    (a, b), (low, high) = curve.zeros[after - 1 : after + 1], curve.costs[after - 1 : after + 1]
    share = (zeros - a) / (b - a)
    return math.exp((1 - share) * math.log(max(low, TINY)) + share * math.log(max(high, TINY)))


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
