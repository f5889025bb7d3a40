from __future__ import annotations

import math
import warnings

import pytest
import torch

from sparsekern._warnings import SparsekernWarning
from sparsekern.ops import masked_lstsq
from sparsekern.ops.masked_lstsq import reference

from .strategies import INTERPRETED

SHAPES = [(1, 1), (3, 15), (17, 64)] + ([] if INTERPRETED else [(50, 65), (97, 130)])


def problem(rows: int, columns: int, generator: torch.Generator, tokens: int | None = None, density: float | None = None):
    """Weights, a Gram matrix of features of different size, and masks that keep from nothing to everything of a row."""
    x = torch.randn(tokens or 3 * columns, columns, generator=generator) * torch.exp(torch.randn(columns, generator=generator))
    weight = torch.randn(rows, columns, generator=generator)
    share = torch.linspace(0, 1.01, rows)[:, None] if density is None else density
    return weight, x.T @ x, torch.rand(rows, columns, generator=generator) < share


def exact(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, damping: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row in float64: the solution, and its error `d H d^T`."""
    gram = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = weight.double()
    solution = torch.zeros_like(weight)
    for row, support in enumerate(mask):
        solution[row, support] = torch.linalg.solve(gram[support][:, support], gram[support] @ weight[row])
    delta = solution - weight
    return solution, ((delta @ gram) * delta).sum(1)


@pytest.mark.parametrize("solver", ["auto", "cholesky", "cg"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_reaches_the_smallest_error(isa, generator, solver, rows, columns, damping):
    weight, gram, mask = problem(rows, columns, generator)
    new_weight, row_error = masked_lstsq(weight, gram, mask, damping=damping, solver=solver, tolerance=1e-7)
    solution, error = exact(weight, gram, mask, damping)
    assert (new_weight[~mask] == 0).all()
    energy = ((weight @ gram) * weight).sum(1)
    assert (row_error - error).abs().le(1e-4 * error + 1e-5 * energy).all()
    gap = (new_weight - solution) @ gram.double()
    assert ((gap * (new_weight - solution)).sum(1) <= 1e-4 * error + 1e-5 * energy).all()


def test_the_default_tolerance_is_within_a_thousandth(isa, generator):
    weight, gram, mask = problem(64, 120, generator, density=0.5)
    row_error = masked_lstsq(weight, gram, mask, solver="cg")[1]
    assert (row_error <= 1.001 * exact(weight, gram, mask)[1]).all()


def test_a_loose_tolerance_stops_early_and_each_iteration_helps(isa, generator):
    weight, gram, mask = problem(64, 120, generator, density=0.5)
    errors = [masked_lstsq(weight, gram, mask, solver="cg", tolerance=t)[1].sum() for t in (10.0, 0.3, 0.03, 1e-4)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    with pytest.warns(SparsekernWarning):
        one = masked_lstsq(weight, gram, mask, solver="cg", tolerance=0, max_iterations=1)[1].sum()
    assert one >= errors[0]


def test_iterations_that_do_not_suffice_are_said(isa, generator):
    weight, gram, mask = problem(20, 90, generator, density=0.5)
    mask[3] = False  # nothing to do
    with pytest.warns(SparsekernWarning, match="masked_lstsq: 19 of 20 rows are not within tolerance 1e-12 after 2 iterations"):
        masked_lstsq(weight, gram, mask, solver="cg", tolerance=1e-12, max_iterations=2)


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_the_start_does_not_change_the_result(isa, generator, solver):
    weight, gram, mask = problem(40, 90, generator)
    settings = {"solver": solver, "tolerance": 1e-9}
    expected = masked_lstsq(weight, gram, mask, **settings)[1]
    other = masked_lstsq(weight, gram, mask, start=torch.randn(40, 90, generator=generator), **settings)[1]
    energy = ((weight @ gram) * weight).sum(1)
    assert (other - expected).abs().le(1e-3 * expected + 1e-5 * energy).all()


def test_the_solution_as_start_needs_no_iterations(isa, generator):
    weight, gram, mask = problem(40, 90, generator, density=0.4)
    solution = masked_lstsq(weight, gram, mask, solver="cholesky")[0]
    again = masked_lstsq(weight, gram, mask, start=solution, solver="cg", max_iterations=2)[0]  # two, to know that it may stop
    torch.testing.assert_close(again, solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", ["auto", "cholesky", "cg"])
def test_supports_that_the_tokens_do_not_determine(isa, generator, solver):
    weight, gram, mask = problem(30, 80, generator, tokens=25, density=0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row_error = masked_lstsq(weight, gram, mask, solver=solver)[1]
    assert (row_error < 1e-3 * ((weight @ gram) * weight).sum(1)).all()  # 48 weights fit 25 tokens


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_dead_features_get_no_weight(isa, generator, solver, damping):
    weight, gram, mask = problem(20, 50, generator, density=0.7)
    dead = [0, 17, 49]
    gram[dead], gram[:, dead] = 0, 0
    new_weight = masked_lstsq(weight, gram, mask, damping=damping, solver=solver, tolerance=1e-9)[0]
    assert (new_weight[:, dead] == 0).all()
    live = [i for i in range(50) if i not in dead]
    shift = damping * gram.diagonal().mean() / gram[live][:, live].diagonal().mean()
    solution = exact(weight[:, live], gram[live][:, live], mask[:, live], float(shift))[0]
    torch.testing.assert_close(new_weight[:, live].double(), solution, rtol=1e-2, atol=1e-2)


def test_only_the_lower_triangle_is_read(isa, generator):
    weight, gram, mask = problem(20, 70, generator)
    garbage = gram.tril() + torch.full_like(gram, math.nan).triu(1)
    for got, want in zip(masked_lstsq(weight, garbage, mask), masked_lstsq(weight, gram, mask), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_computed_in_float32(isa, generator, dtype):
    weight, gram, mask = problem(20, 70, generator)
    weight = weight.to(dtype)
    half, error = masked_lstsq(weight, gram, mask, start=torch.zeros_like(weight))
    full, full_error = masked_lstsq(weight.float(), gram, mask, start=torch.zeros(20, 70))
    assert half.dtype == dtype and torch.equal(half, full.to(dtype)) and torch.equal(error, full_error)


def test_a_full_mask_gives_the_weight_and_an_empty_one_nothing(isa, generator):
    weight, gram, _ = problem(20, 70, generator)
    new_weight, row_error = masked_lstsq(weight, gram, torch.ones(20, 70, dtype=torch.bool))
    assert torch.allclose(new_weight, weight, rtol=1e-5) and (row_error == 0).all()
    new_weight, row_error = masked_lstsq(weight, gram, torch.zeros(20, 70, dtype=torch.bool))
    assert (new_weight == 0).all()
    torch.testing.assert_close(row_error, ((weight @ gram) * weight).sum(1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("function", [masked_lstsq, reference])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["weight", "gram", "start"])
def test_values_that_are_not_finite_are_named(isa, generator, function, bad, name):
    weight, gram, mask = problem(40, 40, generator)
    arguments = {"weight": weight, "gram": gram, "start": weight.clone()}
    arguments[name][30, 20] = bad
    with pytest.raises(ValueError, match=rf"{name}: expected finite values, got {bad} at \[30, 20\]"):
        function(mask=mask, **arguments)


W, G, M = torch.zeros(2, 8), torch.eye(8), torch.ones(2, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((W.double(), G, M), {}, TypeError, "weight: expected dtype float32 or bfloat16 or float16, got float64"),
        ((W, G[:7], M), {}, ValueError, r"gram: expected a square matrix, got shape \(7, 8\)"),
        ((W, torch.eye(9), M), {}, ValueError, r"gram: expected shape \(8, 8\), got \(9, 9\)"),
        ((W, G, W), {}, TypeError, "mask: expected dtype bool, got float32"),
        ((W, G, M), {"start": W.half()}, TypeError, "start: expected dtype float32, got float16"),
        ((W, G, M), {"damping": -1.0}, ValueError, "damping: expected at least 0, got -1.0"),
        ((W, G, M), {"tolerance": math.nan}, ValueError, "tolerance: expected a finite number, got nan"),
        ((W, G, M), {"max_iterations": 0}, ValueError, "max_iterations: expected at least 1, got 0"),
        ((W, G, M), {"solver": "qr"}, ValueError, "solver: expected one of auto, cholesky, cg, got 'qr'"),
    ],
)
def test_refusals(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        masked_lstsq(*arguments, **settings)


def test_empty(isa):
    for rows, columns in ((0, 8), (3, 0)):
        new_weight, row_error = masked_lstsq(
            torch.zeros(rows, columns), torch.eye(columns), torch.ones(rows, columns, dtype=torch.bool)
        )
        assert new_weight.shape == (rows, columns) and row_error.shape == (rows,)
