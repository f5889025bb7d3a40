from __future__ import annotations

import pytest
import torch

from sparsekern.triton_kernels import feature_norm
from sparsekern.triton_kernels.feature_norm import add_, partial_sums


@pytest.mark.parametrize("features", [1, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_splits_of_the_tokens(monkeypatch, dtype, features):
    monkeypatch.setattr(feature_norm, "split_tokens", lambda *sizes: 32)
    x = (torch.randn(70, features) + 0.5).to(dtype)
    row_mask = torch.arange(70) % 7 > 0
    found = partial_sums(x, row_mask=row_mask, both=True)
    assert found.sums.shape == (3, 2, features) and not found.suspect
    used = x[row_mask].double()
    torch.testing.assert_close(found.sums[:, 0].sum(0), used.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.sums[:, 1].sum(0), used.sum(0), rtol=1e-6, atol=1e-5)


def test_more_splits_than_are_added_at_a_time():
    sums = torch.randn(150, 40, dtype=torch.float64)
    out = torch.ones(80)[::2]
    add_(out, sums)
    torch.testing.assert_close(out, (sums.sum(0) + 1).float())


def test_a_part_of_a_larger_matrix():
    large = torch.randn(40, 100).bfloat16()
    found = partial_sums(large[::2, 3:50], row_mask=None, both=False)
    torch.testing.assert_close(found.sums.sum((0, 1)), large[::2, 3:50].double().square().sum(0), rtol=1e-6, atol=0)


def test_only_sums_that_are_not_finite_are_suspect():
    x = torch.ones(50, 300)
    for value, suspect in ((1e18, False), (1e30, True), (float("nan"), True), (float("-inf"), True)):
        x[20, 299] = value
        assert bool(partial_sums(x, row_mask=None, both=False).suspect) == suspect


def test_direct_calls_do_not_leave_their_memory():
    with pytest.raises(ValueError, match=r"row_mask: expected shape \(4,\) of torch.bool"):
        partial_sums(torch.zeros(4, 3), row_mask=torch.ones(3) > 0, both=False)
    with pytest.raises(ValueError, match="x: expected .* got .* of torch.float64"):
        partial_sums(torch.zeros(4, 3).double(), row_mask=None, both=False)
    with pytest.raises(ValueError, match=r"out: expected shape \(3,\)"):
        add_(torch.zeros(4), torch.zeros(1, 3).double())
