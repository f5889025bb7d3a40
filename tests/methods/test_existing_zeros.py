"""Zeros that a weight has before it is pruned stay zero, and count as pruned before any other weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import sparsekern
from sparsekern import ALPS, NM, SparseGPT, SparseLLM, Unstructured, ops
from sparsekern.methods.existing_zeros import sweep_keeping_zeros
from sparsekern.pattern import parse_pattern

from .. import tiny
from .conftest import make_layer

METHODS = (SparseGPT(), SparseGPT(scope="row"), SparseGPT(scope="matrix"), ALPS(), ALPS(scope="row"))
EVERY_METHOD = pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name} {method.scope}")
EVERY_PATTERN = pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:5", 0.5, 0.25, 0.8])


def with_zeros(rows: int, columns: int, share: float, dtype: torch.dtype = torch.float32, seed: int = 1):
    """A layer whose weight has zeros of either sign, more of them on the left."""
    layer = make_layer(rows, columns, 3 * columns, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    gone = torch.rand(rows, columns, generator=generator) < torch.linspace(1.6 * share, 0.4 * share, columns)
    return layer._replace(
        weight=torch.where(gone, torch.where(torch.rand_like(gone.float()) < 0.5, 0.0, -0.0).to(dtype), layer.weight)
    )


def expected_zeros(weight: torch.Tensor, pattern, unit: str) -> torch.Tensor:
    """How many zeros each group, row or matrix must have: those of the pattern, or those that it had if they are more."""
    zero = weight == 0
    if isinstance(pattern, NM):
        return zero.unflatten(1, (-1, pattern.m)).sum(2).clamp(min=pattern.m - pattern.n)
    counted = zero.sum(1) if unit == "row" else zero.sum()[None]
    total = zero.numel() // len(counted)
    return counted.clamp(min=math.floor(total * pattern.sparsity + 1e-9))


def zeros_of(weight: torch.Tensor, pattern, unit: str) -> torch.Tensor:
    zero = weight == 0
    if isinstance(pattern, NM):
        return zero.unflatten(1, (-1, pattern.m)).sum(2)
    return zero.sum(1) if unit == "row" else zero.sum()[None]


@EVERY_METHOD
@EVERY_PATTERN
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6])
def test_zeros_stay_and_count(method, pattern, share):
    layer, pattern = with_zeros(7, 60, share), parse_pattern(pattern)
    new = method.solve(layer.weight, layer.statistics(), pattern).weight
    assert not new[layer.weight == 0].any()
    assert torch.equal(zeros_of(new, pattern, method.scope), expected_zeros(layer.weight, pattern, method.scope))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [SparseGPT(), ALPS()], ids=lambda method: method.name)
def test_in_half_precision_too(method, dtype):
    layer = with_zeros(6, 40, 0.3, dtype)
    solution = method.solve(layer.weight, layer.statistics(), NM(2, 4))
    assert solution.weight.dtype == dtype and not solution.weight[layer.weight == 0].any()
    energy = layer.statistics().row_energy(solution.weight.float() - layer.weight.float())
    torch.testing.assert_close(solution.row_error, energy, rtol=1e-3, atol=1e-3)


@EVERY_METHOD
@EVERY_PATTERN
def test_a_weight_without_zeros_is_pruned_as_without_the_setting(method, pattern):
    layer, pattern = make_layer(6, 60, 150), parse_pattern(pattern)
    other = type(method)(scope=method.scope, keep_zeros=False)
    assert torch.equal(*(way.solve(layer.weight, layer.statistics(), pattern).weight for way in (method, other)))


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_without_the_setting_zeros_come_back(pattern):
    layer = with_zeros(8, 40, 0.4)
    for method in (SparseGPT(keep_zeros=False), ALPS(keep_zeros=False)):
        assert method.solve(layer.weight, layer.statistics(), parse_pattern(pattern)).weight[layer.weight == 0].any()


def plain_sweep(weight: torch.Tensor, factor: torch.Tensor, choose, part: int) -> torch.Tensor:
    """Optimal brain surgery column by column in float64, from the inverse Hessian: all weights to the right are updated at once.

    `choose(score, zero, first)` returns the mask of a part of the columns.
    """
    factor = factor.double()
    upper = torch.linalg.cholesky(torch.linalg.inv(factor @ factor.T), upper=True)
    work, zero = weight.double().clone(), weight == 0
    for first in range(0, weight.shape[1], part):
        last = min(first + part, weight.shape[1])
        mask = choose((work[:, first:last] / upper.diagonal()[first:last]).abs(), zero[:, first:last], first)
        for j in range(first, last):
            new = work[:, j] * mask[:, j - first]
            work[:, j + 1 :] -= ((work[:, j] - new) / upper[j, j])[:, None] * upper[j, j + 1 :]
            work[:, j] = new
    return work


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (20, 64)])
def test_groups_are_those_of_the_plain_sweep(n, m):
    layer = with_zeros(9, 3 * m * max(1, 50 // m), 0.3)
    factor = layer.statistics().factor(0.01)

    def choose(score, zero, first):
        mask = torch.zeros_like(zero)
        for row in range(len(mask)):
            alive = [j for j in range(m) if not zero[row, j]]
            for j in sorted(alive, key=lambda j: -score[row, j])[:n]:
                mask[row, j] = True
        return mask

    expected = plain_sweep(layer.weight, factor, choose, m)
    new, error = sweep_keeping_zeros(layer.weight, factor, NM(n, m), scope="block", block_size=16)
    torch.testing.assert_close(new.double(), expected, rtol=1e-4, atol=1e-4)
    change = (new - layer.weight).double() @ factor.double()
    torch.testing.assert_close(error.double(), change.square().sum(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", ["block", "row"])
def test_a_sparsity_takes_of_each_block_in_proportion_to_its_nonzeros(scope):
    layer, size = with_zeros(5, 48, 0.3), 16
    factor = layer.statistics().factor(0.01)
    rows = [[row] for row in range(5)] if scope == "row" else [list(range(5))]

    def choose(score, zero, first):
        mask = torch.zeros_like(zero)
        for unit in rows:
            alive = (layer.weight[unit] != 0).sum(0).cumsum(0).tolist()
            excess = max(0, alive[-1] - (len(unit) * 48 - len(unit) * 24))
            until = [excess * count // alive[-1] for count in (0, *alive)]
            places = [(i, j) for i in unit for j in range(size) if not zero[i, j]]
            kept = len(places) - (until[first + size] - until[first])
            for i, j in sorted(places, key=lambda place: -score[place])[:kept]:
                mask[i, j] = True
        return mask

    expected = plain_sweep(layer.weight, factor, choose, size)
    new, _ = sweep_keeping_zeros(layer.weight, factor, Unstructured(0.5), scope=scope, block_size=size)
    torch.testing.assert_close(new.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_the_rest_compensates(pattern):
    """Better than the same zeros without compensation, and ADMM is no worse than the sweep by much."""
    layer, pattern = with_zeros(16, 64, 0.4), parse_pattern(pattern)
    error = {}
    for method in (SparseGPT(), ALPS()):
        solution = method.solve(layer.weight, layer.statistics(), pattern)
        error[method.name] = float(solution.row_error.sum())
        plain = layer.weight * (solution.weight != 0)
        assert error[method.name] < 0.9 * float(layer.statistics().row_energy(plain - layer.weight).sum())
    assert error["alps"] < error["sparsegpt"]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name} {method.scope}")
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_a_weight_that_has_the_pattern_is_left_as_it_is(method, pattern):
    layer, pattern = make_layer(8, 40, 120), parse_pattern(pattern)
    weight = sparsekern.Magnitude(scope="row").solve(layer.weight, None, NM(1, 4)).weight
    solution = method.solve(weight, layer.statistics(), pattern)
    torch.testing.assert_close(solution.weight, weight, rtol=1e-4, atol=1e-4)
    assert float(solution.row_error.sum()) <= 1e-6 * float(layer.statistics().row_energy(weight).sum())


@pytest.mark.parametrize("pattern", ["2:4", 0.5, 0.0])
def test_awkward_weights(pattern):
    """Rows without a zero, of nothing else, a feature that was never active, and a weight of zeros alone."""
    layer, pattern = with_zeros(6, 40, 0.3), parse_pattern(pattern)
    x = layer.x.clone()
    x[:, 5:9] = 0
    layer = layer._replace(x=x)
    layer.weight[1] = make_layer(1, 40, 9, seed=5).weight[0]
    layer.weight[2] = 0
    for method in METHODS:
        new = method.solve(layer.weight, layer.statistics(), pattern).weight
        assert new.isfinite().all() and not new[2].any() and not new[layer.weight == 0].any() and new[1].any()
        assert not method.solve(torch.zeros(4, 40), layer.statistics(), pattern).weight.any()


def test_rows_without_zeros_are_swept_by_the_op():
    layer = with_zeros(6, 40, 0.3)
    layer.weight[1:3] = make_layer(2, 40, 9, seed=5).weight
    factor = layer.statistics().factor(0.01)
    new, error = sweep_keeping_zeros(layer.weight, factor, NM(2, 4), scope="block", block_size=128)
    expected, _, expected_error = ops.obs_sweep(layer.weight[1:3], factor, "2:4")
    assert torch.equal(new[1:3], expected) and torch.equal(error[1:3], expected_error)


def test_several_weights_at_once_are_solved_as_one_by_one():
    layers = [with_zeros(6, 40, share, seed=seed) for seed, share in enumerate((0.3, 0.0, 0.6))]
    statistics = [layer.statistics() for layer in layers]
    found = SparseGPT().solve_many([layer.weight for layer in layers], statistics, NM(2, 4))
    for solution, layer in zip(found, layers, strict=True):
        expected = SparseGPT().solve(layer.weight, layer.statistics(), NM(2, 4))
        assert torch.equal(solution.weight, expected.weight)
        torch.testing.assert_close(solution.row_error, expected.row_error, rtol=1e-5, atol=0)


def test_values_that_are_not_finite_are_named():
    weight = torch.ones(3, 8)
    weight[0, 0], weight[2, 5] = 0, math.nan
    with pytest.raises(ValueError, match=r"weight: expected finite values, got nan at \[2, 5\]"):
        sweep_keeping_zeros(weight, torch.eye(8), NM(2, 4), scope="block", block_size=128)


@pytest.mark.parametrize("mask", ["magnitude", "wanda"])
def test_a_fixed_mask_with_more_places_than_weights(mask):
    layer = with_zeros(6, 40, 0.6)
    new = SparseGPT(mask=mask).solve(layer.weight, layer.statistics(), NM(2, 4)).weight
    assert not new[layer.weight == 0].any()


@pytest.mark.parametrize(
    "method", ["magnitude", "wanda", "sparsegpt", "alps", "copal", "sparsellm", SparseLLM(solver="wanda")], ids=str
)
def test_a_pruned_model_is_pruned_further(method):
    """From half of the weights to 2:4, and no zero comes back, whatever the method."""
    model = tiny.llama(96, num_hidden_layers=1)
    ids = torch.randint(96, (4, 32), generator=torch.Generator().manual_seed(0))
    sparsekern.prune(model, "magnitude", 0.5, progress=False)
    before = {name: value == 0 for name, value in model.state_dict().items()}
    report = sparsekern.prune(model, method, "2:4", ids, progress=False)
    assert report.sparsity > 0.5
    for name, value in model.state_dict().items():
        assert not value[before[name]].any(), name


@dataclass(frozen=True)
class Shifted(sparsekern.Wanda):
    """A method of one's own that knows nothing of zeros."""

    name: ClassVar[str] = "shifted"

    def solve(self, weight, statistics, pattern):
        return super().solve(weight + 1, statistics, pattern)


@pytest.mark.parametrize(
    "method", [SparseGPT(keep_zeros=False), Shifted(), SparseLLM("wanda", keep_zeros=False)], ids=lambda m: m.name
)
def test_zeros_that_come_back_are_counted_once(method):
    model = tiny.llama(96, num_hidden_layers=2)
    ids = torch.randint(96, (4, 32), generator=torch.Generator().manual_seed(0))
    sparsekern.prune(model, "magnitude", 0.5, progress=False)
    linears = dict(model.model.layers[0].named_modules())
    before = {name: linear.weight == 0 for name, linear in linears.items() if isinstance(linear, torch.nn.Linear)}
    with pytest.warns(
        sparsekern.SparsekernWarning, match="weights that were zero before pruning are not zero afterwards"
    ) as caught:
        sparsekern.prune(model, method, "2:4", ids, progress=False)
    lost = sum(int((linears[name].weight[zero] != 0).sum()) for name, zero in before.items())
    assert len(caught) == 1 and f"{lost:,} of {sum(int(zero.sum()) for zero in before.values()):,} weights" in str(
        caught[0].message
    )
