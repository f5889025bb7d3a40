from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import feature_norm_
from sparsekern.ops.feature_norm import reference

from .strategies import FLOATS, INTERPRETED, PROPERTY


def in_float64(x, row_mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    x = (x if row_mask is None else x[row_mask]).double()
    return x.square().sum(0), x.sum(0)


@PROPERTY
@given(
    tokens=st.integers(0, 70),
    features=st.integers(0, 40),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
    masked=st.booleans(),
)
def test_any_size(isa, tokens, features, dtype, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator).to(dtype)
    row_mask = torch.rand(tokens, generator=generator) > 0.3 if masked else None
    squares, sums = torch.ones(features), torch.full((features,), 2.0)
    assert feature_norm_(squares, x, row_mask=row_mask, sum=sums) is squares
    expected_squares, expected_sums = in_float64(x, row_mask)
    torch.testing.assert_close(squares.double(), expected_squares + 1, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.double(), expected_sums + 2, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_less_accurate_than_torch(isa, generator, dtype):
    tokens, features = (600, 140) if INTERPRETED else (3000, 1100)
    x = (torch.randn(tokens, features, generator=generator) + 0.5).to(dtype)
    expected = in_float64(x)
    squares, sums = torch.zeros(features), torch.zeros(features)
    feature_norm_(squares, x, sum=sums)
    theirs = x.float().square().sum(0), x.float().sum(0)
    for got, torchs, want in zip((squares, sums), theirs, expected, strict=True):
        assert (got - want).abs().max() <= 2 * (torchs - want).abs().max()


def test_threads_do_not_change_a_bit(isa, threads, generator):
    x = torch.randn(2100, 1300, generator=generator)
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(feature_norm_(torch.zeros(1300), x))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_long_run_of_equal_tokens_loses_nothing(isa):
    """Sums of so many in float32, one after another, are wrong in the fifth digit."""
    squares = feature_norm_(torch.zeros(3), torch.full((10_000, 3), 0.1))
    assert squares.tolist() == pytest.approx([10_000 * torch.tensor(0.1).double().item() ** 2] * 3, rel=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_first_value_that_is_not_finite_is_named_and_nothing_changes(isa, dtype, bad):
    x = torch.ones(600, 40, dtype=dtype)
    x[3, 3] = math.nan  # masked out
    x[590, 2] = x[400, 39] = x[400, 7] = bad
    row_mask = torch.arange(600) != 3
    for function in (feature_norm_, reference):
        squares, sums = torch.ones(40), torch.ones(40)
        with pytest.raises(ValueError, match=rf"^x: expected finite values, got {bad} at \[400, 7\]"):
            function(squares, x, row_mask=row_mask, sum=sums)
        assert squares.eq(1).all() and sums.eq(1).all()


def test_large_finite_values_are_not_taken_for_infinite(isa):
    x = torch.full((2, 3), 1e30)
    assert feature_norm_(torch.zeros(3), x).isinf().all()
    assert feature_norm_(torch.zeros(3), x.mul(1e-15)).tolist() == pytest.approx([2e30] * 3)


def test_strided_outputs(isa):
    squares, sums = torch.zeros(6)[::2], torch.zeros(6)[::2]
    feature_norm_(squares, torch.tensor([[1.0, 2.0, 3.0]]), sum=sums)
    assert squares.tolist() == [1, 4, 9] and sums.tolist() == [1, 2, 3]


def test_arguments_are_refused():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \('any', 5\), got \(4, 3\)"):
        feature_norm_(torch.zeros(5), x)
    with pytest.raises(TypeError, match="sum_squares: expected dtype float32, got float64"):
        feature_norm_(torch.zeros(3).double(), x)
    with pytest.raises(ValueError, match=r"row_mask: expected shape \(4,\), got \(3,\)"):
        feature_norm_(torch.zeros(3), x, row_mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"sum: expected shape \(3,\), got \(4,\)"):
        feature_norm_(torch.zeros(3), x, sum=torch.zeros(4))
