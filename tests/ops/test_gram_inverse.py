from __future__ import annotations

import math
import sys

import pytest
import torch

from sparsekern._warnings import SparsekernWarning
from sparsekern.ops import gram_inverse
from sparsekern.ops.gram_inverse import reference

from .test_gram_solve import damped, problem


@pytest.mark.parametrize("features", [1, 2, 16, 47, 48, 49, 64, 65, 130, 513, 600])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_as_accurate_as_pytorch_and_exactly_symmetric(isa, generator, features, damping):
    gram, _ = problem(1, features, generator)
    exact = torch.linalg.inv(damped(gram, damping))
    theirs = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damping).float()))
    ours = gram_inverse(gram, damping)
    assert torch.equal(ours, ours.T)
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("features", [130, 200])
def test_panels_of_a_large_matrix(monkeypatch, generator, features):
    monkeypatch.setattr(sys.modules["sparsekern.ops.gram_inverse"], "PANEL", 48)
    gram, _ = problem(1, features, generator)
    gram[7] = gram[:, 7] = 0
    exact = torch.linalg.inv(damped(gram, 0.1))
    exact[7, 7] = 0
    inverse, _ = reference(gram, 0.1)
    assert torch.equal(inverse, inverse.T) and (inverse - exact).norm() <= 1e-5 * exact.norm()


def test_only_the_lower_triangle_is_read(isa, generator):
    gram, _ = problem(1, 70, generator)
    garbage = gram.tril() + torch.full_like(gram, math.nan).triu(1)
    assert torch.equal(gram_inverse(garbage), gram_inverse(gram))


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_dead_features_stay_out(isa, generator, damping):
    gram, _ = problem(1, 70, generator)
    dead = torch.zeros(70, dtype=torch.bool)
    dead[[0, 33, 69]] = True
    gram[dead] = gram[:, dead] = 0
    inverse = gram_inverse(gram, damping)
    assert (inverse[dead] == 0).all() and (inverse[:, dead] == 0).all()
    exact = torch.linalg.inv(damped(gram, damping)[~dead][:, ~dead])
    torch.testing.assert_close(inverse[~dead][:, ~dead].double(), exact, rtol=1e-4, atol=1e-6)


def test_rank_deficiency_is_damped_and_said(isa, generator):
    gram, _ = problem(1, 100, generator, tokens=40)
    with pytest.warns(SparsekernWarning, match="gram: not positive definite with damping 0; used 1e-0[65] instead"):
        inverse = gram_inverse(gram, damping=0.0)
    assert inverse.isfinite().all()


@pytest.mark.parametrize("function", [gram_inverse, reference])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(isa, function, bad):
    gram = torch.eye(40)
    gram[30, 20] = bad
    with pytest.raises(ValueError, match=rf"gram: expected finite values, got {bad} at \[30, 20\]"):
        function(gram)


@pytest.mark.parametrize(
    ("gram", "damping", "error", "message"),
    [
        (torch.eye(3), math.nan, ValueError, "damping: expected a finite number, got nan"),
        (torch.eye(3), -1, ValueError, "damping: expected at least 0, got -1"),
        (torch.zeros(2, 3), 0.01, ValueError, r"gram: expected a square matrix, got shape \(2, 3\)"),
        (torch.eye(3).bfloat16(), 0.01, TypeError, "gram: expected dtype float32, got bfloat16"),
        (torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 0.01, ValueError, "gram: not positive semi-definite"),
    ],
)
def test_refusals(gram, damping, error, message):
    with pytest.raises(error, match=message):
        gram_inverse(gram, damping)


def test_empty(isa):
    assert gram_inverse(torch.zeros(0, 0)).shape == (0, 0)
