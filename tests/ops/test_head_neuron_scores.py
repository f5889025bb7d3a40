from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import feature_norm_, head_neuron_scores

from .strategies import FLOATS, PROPERTY


@PROPERTY
@given(
    tokens=st.integers(0, 40),
    units=st.integers(0, 12),
    head_size=st.integers(1, 9),
    rows=st.integers(1, 20),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
)
def test_is_the_error_of_leaving_a_unit_out(tokens, units, head_size, rows, dtype, seed):
    """Of each feature alone, by running the projection with everything else set to zero."""
    generator = torch.Generator().manual_seed(seed)
    features = units * head_size
    x = torch.randn(tokens, features, generator=generator).to(dtype)
    weight = torch.randn(rows, features, generator=generator).to(dtype)
    row_mask = torch.rand(tokens, generator=generator) > 0.3
    sums = feature_norm_(torch.zeros(features), x, row_mask=row_mask)
    alone = [(x[row_mask, i, None].double() * weight[:, i].double()).square().sum() / rows for i in range(features)]
    expected = torch.tensor(alone, dtype=torch.float64).reshape(units, head_size).mean(1)
    torch.testing.assert_close(head_neuron_scores(sums, weight, head_size).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(6), torch.ones(2, 6), 4), ValueError, "head_size: expected a divisor of the 6 features, got 4"),
        ((torch.ones(6), torch.ones(2, 6), 0), ValueError, "head_size: expected at least 1, got 0"),
        ((torch.ones(6), torch.ones(2, 6), 1.0), TypeError, "head_size: expected a whole number, got 1.0"),
        ((torch.ones(6), torch.ones(2, 5)), ValueError, r"weight: expected shape \('any', 6\), got \(2, 5\)"),
        ((torch.ones(6), torch.ones(0, 6)), ValueError, r"weight: expected at least one output, got shape \(0, 6\)"),
        ((torch.ones(6).double(), torch.ones(2, 6)), TypeError, "sum_squares: expected dtype float32, got float64"),
        ((torch.ones(1), torch.full((1, 1), math.nan)), ValueError, r"weight: expected finite values, got nan at \[0, 0\]"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        head_neuron_scores(*arguments)
