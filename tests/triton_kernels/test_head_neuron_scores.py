from __future__ import annotations

import math

import pytest
import torch

from sparsekern import backends
from sparsekern.ops import head_neuron_scores
from sparsekern.triton_kernels import feature_norm
from sparsekern.triton_kernels.head_neuron_scores import score


@pytest.mark.parametrize(("units", "head_size"), [(150, 1), (30, 5), (3, 64), (2, 80), (1, 200)])
@pytest.mark.parametrize("splits", [1, 20])
def test_units_of_any_size_and_more_splits_than_are_added_at_a_time(units, head_size, splits):
    sums = torch.rand(splits, units * head_size, dtype=torch.float64)
    squares = torch.rand(2 * units * head_size)[::2]
    found = score(squares, sums, 7, head_size)
    expected = (sums.sum(0) * squares).reshape(units, head_size).mean(1) / 7
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_split(monkeypatch, dtype):
    monkeypatch.setattr(feature_norm, "split_tokens", lambda *sizes: 32)
    weight, squares = torch.randn(100, 36).to(dtype), torch.rand(36)
    expected = (weight.double().square().mean(0) * squares).reshape(9, 4).mean(1).float()
    found = head_neuron_scores(squares, weight, 4)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(found, head_neuron_scores(squares, weight, 4))


def test_only_weights_that_are_not_finite_are_refused():
    weight = torch.ones(40, 6)
    weight[30, 2] = 1e30  # its square is too large for float32
    assert head_neuron_scores(torch.ones(6), weight).isfinite().tolist() == [True, True, False, True, True, True]
    weight[30, 2] = -math.inf
    with pytest.raises(ValueError, match=r"weight: expected finite values, got -inf at \[30, 2\]"):
        head_neuron_scores(torch.ones(6), weight)
    with backends.value_checks(False):
        assert head_neuron_scores(torch.ones(6), weight)[2].isinf()


def test_a_direct_call_does_not_leave_its_memory():
    with pytest.raises(ValueError, match=r"sum_squares: expected shape \(6,\)"):
        torch.ops.sparsekern.head_neuron_scores(torch.zeros(5), torch.zeros(2, 6))
    for head_size in (0, 4):
        with pytest.raises(ValueError, match=f"head_size: expected a divisor of 6, got {head_size}"):
            torch.ops.sparsekern.head_neuron_scores(torch.zeros(6), torch.zeros(2, 6), head_size)
