from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import cross_gram_, gram_, gram_solve, gram_symmetrize_
from sparsekern.ops.cross_gram import reference

from .strategies import FLOATS, PROPERTY


def in_float64(x, y, row_mask=None) -> torch.Tensor:
    x, y = ((z if row_mask is None else z[row_mask]).double() for z in (x, y))
    return x.T @ y


@PROPERTY
@given(
    tokens=st.integers(0, 90),
    p=st.integers(0, 140),
    q=st.integers(0, 140),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
    masked=st.booleans(),
    alpha=st.sampled_from([1.0, -0.5, 2.0]),
)
def test_any_size(tokens, p, q, dtype, seed, masked, alpha):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(tokens, features, generator=generator).to(dtype) for features in (p, q))
    row_mask = torch.rand(tokens, generator=generator) > 0.3 if masked else None
    before = torch.randn(p, q, generator=generator)
    cross = before.clone()
    assert cross_gram_(cross, x, y, row_mask=row_mask, alpha=alpha) is cross
    expected = before.double() + alpha * in_float64(x, y, row_mask)
    magnitude = before.abs().double() + abs(alpha) * in_float64(x.abs(), y.abs(), row_mask)
    assert ((cross.double() - expected).abs() <= 1e-6 * magnitude).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_it_is_the_gram_matrix_of_one_input(generator, dtype):
    x = torch.randn(300, 70, generator=generator).to(dtype)
    cross = cross_gram_(torch.zeros(70, 70), x, x)
    torch.testing.assert_close(cross, gram_symmetrize_(gram_(torch.zeros(70, 70), x)), rtol=1e-5, atol=1e-3)


def test_more_tokens_than_are_widened_at_a_time(generator, monkeypatch):
    monkeypatch.setattr("sparsekern.ops.cross_gram.TOKENS", 32)
    x, y = torch.randn(100, 7, generator=generator).bfloat16(), torch.randn(100, 5, generator=generator).bfloat16()
    row_mask = torch.arange(100) % 9 > 0
    cross = torch.zeros(7, 5)
    reference(cross, x, y, row_mask=row_mask)
    torch.testing.assert_close(cross.double(), in_float64(x, y, row_mask), rtol=1e-5, atol=1e-5)


def test_with_gram_it_gives_least_squares(generator):
    weight, x = torch.randn(6, 20, generator=generator), torch.randn(500, 20, generator=generator)
    y = x @ weight.T
    gram, cross = gram_(torch.zeros(20, 20), x), cross_gram_(torch.zeros(6, 20), y, x)
    torch.testing.assert_close(gram_solve(gram, cross, damping=0.0), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["x", "y"])
def test_the_first_value_that_is_not_finite_is_named_and_on_a_cpu_nothing_changes(bad, name, request):
    given = {"x": torch.ones(600, 40), "y": torch.ones(600, 30)}
    given[name][3, 3] = math.nan  # masked out
    given[name][590, 2] = given[name][400, 29] = given[name][400, 7] = bad
    row_mask = torch.arange(600) != 3
    for function in (cross_gram_, reference):
        cross = torch.ones(40, 30)
        with pytest.raises(ValueError, match=rf"^{name}: expected finite values, got {bad} at \[400, 7\]"):
            function(cross, **given, row_mask=row_mask)
        if function is reference or not request.config.getoption("--kernels"):
            assert cross.eq(1).all()


def test_products_that_overflow_are_no_error():
    cross = cross_gram_(torch.zeros(1, 2), torch.tensor([[1e30]]), torch.tensor([[1e30, 2.0]]))
    assert cross[0, 0] == math.inf or cross.is_cuda and cross[0, 0].isnan()  # tensor cores add pieces of either sign
    assert cross[0, 1] == 2 * torch.tensor(1e30)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cross": torch.zeros(3)}, ValueError, r"cross: expected 2 dimensions, got shape \(3,\)"),
        ({"cross": torch.zeros(3, 2).double()}, TypeError, "cross: expected dtype float32, got float64"),
        ({"x": torch.zeros(4, 5)}, ValueError, r"x: expected shape \('any', 3\), got \(4, 5\)"),
        ({"x": torch.zeros(4, 3).double()}, TypeError, "x: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"y": torch.zeros(5, 2)}, ValueError, r"y: expected shape \(4, 2\), got \(5, 2\)"),
        ({"y": torch.zeros(4, 2).bfloat16()}, TypeError, "y: expected dtype float32, got bfloat16"),
        ({"row_mask": torch.ones(3) > 0}, ValueError, r"row_mask: expected shape \(4,\), got \(3,\)"),
        ({"alpha": math.inf}, ValueError, "alpha: expected a finite number, got inf"),
    ],
)
def test_refusals(change, error, message):
    call = {"cross": torch.zeros(3, 2), "x": torch.zeros(4, 3), "y": torch.zeros(4, 2), **change}
    with pytest.raises(error, match=message):
        cross_gram_(**call)


def test_a_direct_call_with_wrong_shapes_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.sparsekern.cross_gram_(torch.zeros(3, 3), torch.zeros(2, 3), torch.zeros(2, 4))
