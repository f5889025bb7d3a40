from __future__ import annotations

import importlib
import math
import warnings

import pytest
import torch

from sparsekern._warnings import SparsekernWarning
from sparsekern.ops import reverse_cholesky
from sparsekern.ops.reverse_cholesky import reference
from tests.conftest import COMPILED

SIZES = (1, 2, 15, 16, 17, 95, 96, 97, 130, 193, 300)


def gram_of(features: int, generator: torch.Generator, tokens: int | None = None) -> torch.Tensor:
    x = torch.randn(tokens or 2 * features + 3, features, generator=generator)
    return x.T @ x


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def residual(factor: torch.Tensor, target: torch.Tensor) -> float:
    factor = factor.double()
    return ((factor @ factor.T - target).norm() / target.norm()).item()


@pytest.mark.parametrize("features", SIZES)
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_factor_times_its_transpose_is_the_damped_gram(isa, generator, features, damping):
    gram = gram_of(features, generator)
    factor = reverse_cholesky(gram, damping)
    assert torch.equal(factor, factor.triu()) and factor.diagonal().gt(0).all()
    theirs, _ = reference(gram, damping)
    assert residual(factor, damped(gram, damping)) <= 2 * residual(theirs, damped(gram, damping)) + 1e-7


def test_its_inverse_is_the_textbook_factor(isa, generator):
    gram = gram_of(120, generator)
    textbook = torch.linalg.cholesky(torch.linalg.inv(damped(gram, 0.01)), upper=True)
    inverse = torch.linalg.inv(reverse_cholesky(gram).double())
    torch.testing.assert_close(inverse, textbook, rtol=1e-4, atol=1e-6)


def test_only_the_lower_triangle_is_read(isa, generator):
    gram = gram_of(70, generator)
    garbage = gram.tril() + torch.full_like(gram, math.nan).triu(1)
    assert torch.equal(reverse_cholesky(garbage), reverse_cholesky(gram))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_features_are_marked_by_the_sign_of_their_diagonal(isa, generator, damping):
    x = torch.randn(200, 50, generator=generator)
    x[:, [0, 7, 33, 49]] = 0
    gram = x.T @ x
    factor = reverse_cholesky(gram, damping)
    assert torch.signbit(factor.diagonal()).nonzero().flatten().tolist() == [0, 7, 33, 49]
    assert residual(factor, damped(gram, damping)) < 1e-6
    assert factor[7].count_nonzero() == factor[:, 7].count_nonzero() == (1 if damping else 0)


def test_fewer_tokens_than_features(isa, generator):
    gram = gram_of(100, generator, tokens=20)
    assert residual(reverse_cholesky(gram), damped(gram, 0.01)) < 1e-6


def test_an_indefinite_matrix_escalates_the_damping_and_says_so(isa, generator):
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.02]))
    with pytest.warns(SparsekernWarning, match="not positive definite with damping 0.01; used 0.1 instead"):
        factor = reverse_cholesky(gram, 0.01)
    assert residual(factor, damped(gram, 0.1)) < 1e-6


def test_no_damping_starts_its_escalation_small(isa, generator):
    gram = gram_of(60, generator, tokens=10)
    with pytest.warns(SparsekernWarning, match="used 1e-0[654] instead"):
        factor = reverse_cholesky(gram, 0.0)
    assert residual(factor, gram.double()) < 1e-3


def test_at_the_edge_of_float32_the_damping_reported_is_the_one_used(isa):
    # Whether the last bit of the pivot survives is a matter of rounding; what is reported has to fit the factor either way.
    gram = torch.tensor([[1.0, 0.0], [1.0, 1.0 + 2.0**-23]])
    symmetric = gram.tril() + gram.tril(-1).T
    for function in (torch.ops.sparsekern.reverse_cholesky, reference):
        factor, used = function(gram, 1e-13)
        assert used.item() in (pytest.approx(1e-13), pytest.approx(1e-6))
        assert residual(factor, damped(symmetric, used.item())) < 1e-6


def test_float64_is_the_last_resort_and_is_reported(monkeypatch, generator):
    # No small matrix is known on which float32 fails at every damping of the schedule and float64 does not, so float32 is made to.
    # The kernel's float64 is reached in tests/native/test_sanitizers.py.
    module = importlib.import_module("sparsekern.ops.reverse_cholesky")
    attempt = module._attempt
    monkeypatch.setattr(module, "_attempt", lambda m, d, p: attempt(m, d, p) if m.dtype == torch.float64 else None)
    monkeypatch.setattr(module, "_op", reference)
    gram = gram_of(30, generator)
    with pytest.warns(SparsekernWarning, match="not positive definite in float32 with damping 0.01; factored in float64"):
        factor = reverse_cholesky(gram, 0.01)
    assert factor.dtype == torch.float32 and residual(factor, damped(gram, 0.01)) < 1e-6


@pytest.mark.parametrize("function", [reverse_cholesky, reference])
def test_a_matrix_no_damping_mends_is_refused(isa, function):
    with pytest.raises(ValueError, match=r"gram: not positive semi-definite \(damping 0.01 and up to 1000 times that were tried"):
        function(torch.tensor([[1.0, 50.0], [50.0, 1.0]]))


@pytest.mark.parametrize("function", [reverse_cholesky, reference])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(isa, function, bad):
    gram = torch.eye(40)
    gram[30, 20] = bad
    with pytest.raises(ValueError, match=rf"gram: expected finite values, got {bad} at \[30, 20\]"):
        function(gram)


@pytest.mark.parametrize(
    ("gram", "damping", "error", "message"),
    [
        (torch.eye(3), -0.1, ValueError, "damping: expected at least 0, got -0.1"),
        (torch.eye(3), math.nan, ValueError, "damping: expected a finite number, got nan"),
        (torch.eye(3), math.inf, ValueError, "damping: expected a finite number, got inf"),
        (torch.eye(3), "0.01", TypeError, "damping: expected a number, got '0.01'"),
        (torch.zeros(2, 3), 0.01, ValueError, r"gram: expected a square matrix, got shape \(2, 3\)"),
        (torch.zeros(4, 2, 3), 0.01, ValueError, r"gram: expected a square matrix, got shape \(4, 2, 3\)"),
        (torch.zeros(1, 1, 2, 2), 0.01, ValueError, r"gram: expected 2 dimensions, got shape \(1, 1, 2, 2\)"),
        (torch.eye(3).half(), 0.01, TypeError, "gram: expected dtype float32, got float16"),
    ],
)
def test_refusals(gram, damping, error, message):
    with pytest.raises(error, match=message):
        reverse_cholesky(gram, damping)


def test_a_good_matrix_warns_of_nothing(isa, generator):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reverse_cholesky(gram_of(30, generator))


def test_empty(isa):
    assert reverse_cholesky(torch.zeros(0, 0)).shape == (0, 0)


def assert_each_is_as_if_alone(batch: tuple[torch.Tensor, ...], alone: list[tuple[torch.Tensor, ...]]) -> None:
    """To the bit with the CPU kernel; libraries may factor a batch by other code."""
    for results, singles in zip(batch, zip(*alone, strict=True), strict=True):
        expected = torch.stack(singles)
        relative = 0.0 if COMPILED else 1e-5
        torch.testing.assert_close(results, expected, rtol=relative, atol=relative * float(expected.abs().max()))


@pytest.mark.parametrize("count", [1, 4])
def test_each_matrix_of_a_batch_is_factored_as_if_alone(isa, generator, threads, count):
    grams = torch.stack([gram_of(97, generator) for _ in range(count)])
    grams[count - 1, :, 5] = grams[count - 1, 5, :] = 0
    for workers in (1, 3):  # with 3, some matrices have a thread each and the rest share all
        threads(workers)
        batch = torch.ops.sparsekern.reverse_cholesky(grams, 0.02)
        assert_each_is_as_if_alone(batch, [torch.ops.sparsekern.reverse_cholesky(gram, 0.02) for gram in grams])
    assert torch.signbit(batch[0].diagonal(dim1=1, dim2=2)).nonzero().tolist() == [[count - 1, 5]]


def test_matrices_of_a_batch_that_share_memory(isa, generator):
    gram = gram_of(40, generator)
    assert torch.equal(reverse_cholesky(gram.expand(3, 40, 40))[2], reverse_cholesky(gram))


def test_the_damping_of_a_batch_is_decided_for_each_matrix(isa):
    grams = torch.stack((torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.02])), 2 * torch.eye(4)))
    with pytest.warns(SparsekernWarning) as caught:
        factors = reverse_cholesky(grams, 0.01)
    assert [str(warning.message) for warning in caught] == ["gram[1]: not positive definite with damping 0.01; used 0.1 instead"]
    for factor, gram, damping in zip(factors, grams, (0.01, 0.1, 0.01), strict=True):
        assert residual(factor, damped(gram, damping)) < 1e-6


@pytest.mark.parametrize("function", [reverse_cholesky, reference])
def test_errors_name_the_matrix_of_a_batch(isa, function):
    grams = torch.eye(40).repeat(5, 1, 1)
    grams[4, 1, 0] = grams[4, 0, 1] = 50.0
    with pytest.raises(ValueError, match=r"^gram\[4\]: not positive semi-definite \(damping 0.01"):
        function(grams)
    grams[3, 30, 20] = math.inf
    with pytest.raises(ValueError, match=r"^gram\[3\]: expected finite values, got inf at \[30, 20\]"):
        function(grams)


def test_a_batch_of_nothing(isa):
    assert reverse_cholesky(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    assert reverse_cholesky(torch.zeros(2, 0, 0)).shape == (2, 0, 0)
    assert torch.ops.sparsekern.reverse_cholesky(torch.zeros(0, 3, 3))[1].shape == (0,)
