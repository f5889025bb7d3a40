from __future__ import annotations

import math
import warnings

import pytest
import torch

from sparsekern._warnings import SparsekernWarning
from sparsekern.ops import gram_inverse, gram_solve
from sparsekern.ops.gram_solve import reference

SIZES = [(1, 1), (3, 15), (17, 64), (50, 65), (49, 130), (16, 513), (100, 600)]


def problem(rows: int, features: int, generator: torch.Generator, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens or 2 * features + 3, features, generator=generator)
    return x.T @ x, torch.randn(rows, len(x), generator=generator) @ x


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


@pytest.mark.parametrize(("rows", "features"), SIZES)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_as_accurate_as_pytorch(isa, generator, rows, features, damping):
    gram, cross = problem(rows, features, generator)
    exact = torch.linalg.solve(damped(gram, damping), cross.double().T).T
    theirs = torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped(gram, damping).float())).T
    ours = gram_solve(gram, cross, damping)
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * exact.norm()


def test_are_the_least_squares_weights(isa, generator):
    x, y = torch.randn(90, 30, generator=generator), torch.randn(90, 4, generator=generator)
    weight = gram_solve(x.T @ x, y.T @ x, damping=0.0)
    torch.testing.assert_close(weight.T, torch.linalg.lstsq(x, y).solution, rtol=1e-4, atol=1e-5)


def test_only_the_lower_triangle_is_read(isa, generator):
    gram, cross = problem(5, 70, generator)
    garbage = gram.tril() + torch.full_like(gram, math.nan).triu(1)
    assert torch.equal(gram_solve(garbage, cross), gram_solve(gram, cross))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_nothing_is_known_of_dead_features(isa, generator, damping):
    gram, cross = problem(5, 70, generator)
    dead = torch.zeros(70, dtype=torch.bool)
    dead[[0, 33, 69]] = True
    gram[dead] = gram[:, dead] = 0
    weight = gram_solve(gram, cross, damping)
    assert (weight[:, dead] == 0).all()
    live = damped(gram, damping)[~dead][:, ~dead]
    torch.testing.assert_close(
        weight[:, ~dead].double(), torch.linalg.solve(live, cross[:, ~dead].double().T).T, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("tokens", [40, 95, 99])
def test_fewer_tokens_than_features_are_damped_and_said(isa, generator, tokens):
    x = torch.randn(tokens, 100, generator=generator)
    y = torch.randn(tokens, 3, generator=generator)
    with pytest.warns(SparsekernWarning, match="gram: not positive definite with damping 0; used 1e-0[65] instead"):
        weight = gram_solve(x.T @ x, y.T @ x, damping=0.0)
    assert (x @ weight.T - y).norm() < 1e-2 * y.norm()  # so many unknowns fit the tokens exactly
    assert weight.norm() < 1.01 * (torch.linalg.pinv(x) @ y).norm()  # and the damping keeps them as small as can be


def test_enough_damping_warns_of_nothing(isa, generator):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gram_solve(*problem(3, 100, generator, tokens=20), damping=0.01)


@pytest.mark.parametrize("function", [gram_solve, reference])
def test_a_matrix_no_damping_mends_is_refused(isa, function):
    with pytest.raises(ValueError, match=r"gram: not positive semi-definite \(damping 0.01 and up to 1000 times that were tried"):
        function(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), torch.ones(1, 2))


@pytest.mark.parametrize("function", [gram_solve, reference])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["gram", "cross"])
def test_values_that_are_not_finite_are_named(isa, function, bad, name):
    arguments = {"gram": torch.eye(40), "cross": torch.zeros(50, 40)}
    arguments[name][30, 20] = bad
    with pytest.raises(ValueError, match=rf"{name}: expected finite values, got {bad} at \[30, 20\]"):
        function(**arguments)


@pytest.mark.parametrize(
    ("gram", "cross", "damping", "error", "message"),
    [
        (torch.eye(3), torch.ones(1, 3), -0.1, ValueError, "damping: expected at least 0, got -0.1"),
        (torch.eye(3), torch.ones(1, 3), "0", TypeError, "damping: expected a number, got '0'"),
        (torch.zeros(2, 3), torch.ones(1, 3), 0.01, ValueError, r"gram: expected a square matrix, got shape \(2, 3\)"),
        (torch.eye(3), torch.ones(1, 4), 0.01, ValueError, r"cross: expected shape \('any', 3\), got \(1, 4\)"),
        (torch.eye(3), torch.ones(3), 0.01, ValueError, r"cross: expected 2 dimensions, got shape \(3,\)"),
        (torch.eye(3), torch.ones(1, 3).half(), 0.01, TypeError, "cross: expected dtype float32, got float16"),
        (torch.eye(3).double(), torch.ones(1, 3), 0.01, TypeError, "gram: expected dtype float32, got float64"),
    ],
)
def test_refusals(gram, cross, damping, error, message):
    with pytest.raises(error, match=message):
        gram_solve(gram, cross, damping)


def test_empty(isa):
    assert gram_solve(torch.zeros(0, 0), torch.zeros(3, 0)).shape == (3, 0)
    assert gram_solve(torch.eye(4), torch.zeros(0, 4)).shape == (0, 4)


def test_solving_and_multiplying_with_the_inverse_agree(isa, generator):
    gram, cross = problem(20, 150, generator)
    torch.testing.assert_close(cross @ gram_inverse(gram), gram_solve(gram, cross), rtol=1e-4, atol=1e-5)
