from __future__ import annotations

import math

import pytest
import torch

from sparsekern import backends
from sparsekern.ops import sensitivity_
from sparsekern.triton_kernels import sensitivity


def added(weight: torch.Tensor, x: torch.Tensor, row_mask: torch.Tensor | None = None) -> torch.Tensor:
    """What is added, in float64, from outputs that are rounded as those of the layer are."""
    used = x if row_mask is None else x[row_mask]
    return weight.double().abs() * ((used @ weight.T).double().abs().T @ used.double().abs())


@pytest.fixture
def small_tiles(few_multiprocessors, monkeypatch):
    """Few outputs at a time, on a device where the product of those takes whole waves, splits and chains."""
    monkeypatch.setattr(sensitivity, "config", lambda *sizes: sensitivity.Tile(tokens=96, rows=130))


@pytest.mark.parametrize(
    ("dtype", "features", "masked"),
    [
        (torch.float32, 33, True),
        (torch.float32, 16, False),
        (torch.bfloat16, 130, True),
        (torch.bfloat16, 16, False),
        (torch.float16, 33, False),
    ],
)
def test_whole_waves_and_splits(small_tiles, dtype, features, masked):
    weight, x = torch.randn(134, features).to(dtype), torch.randn(150, features).to(dtype)
    row_mask = torch.arange(150) % 5 > 0 if masked else None
    before = torch.rand(134, features)
    importance = before.clone()
    status = sensitivity.add_(importance, weight, x, row_mask=row_mask, checked=True)
    assert not status.any()
    torch.testing.assert_close(importance.double(), before + added(weight, x, row_mask), rtol=1e-5, atol=1e-5)


def test_what_masked_rows_hold_does_not_matter(small_tiles):
    weight, x = torch.randn(30, 40), torch.randn(110, 40)
    row_mask = torch.arange(110) % 3 > 0
    for value in (math.nan, 1e38):
        x[~row_mask] = value
        importance = torch.zeros(30, 40)
        assert not sensitivity.add_(importance, weight, x, row_mask=row_mask, checked=True).any()
        torch.testing.assert_close(importance.double(), added(weight, x, row_mask), rtol=1e-5, atol=1e-5)


def test_the_same_bits_on_every_run(small_tiles):
    weight, x = torch.randn(40, 70).bfloat16(), torch.randn(150, 70).bfloat16()
    first, second = torch.zeros(40, 70), torch.zeros(40, 70)
    for importance in (first, second):
        sensitivity.add_(importance, weight, x, row_mask=None, checked=False)
    assert torch.equal(first, second)


@pytest.mark.parametrize("tokens", [3, 150])  # whose sums a program keeps for itself, or that are split
def test_after_a_value_that_is_refused_nothing_is_added(few_multiprocessors, tokens):
    weight, x = torch.randn(20, 30), torch.randn(tokens, 30)
    weight[3, 4] = math.inf
    importance = torch.ones(20, 30)
    assert sensitivity.add_(importance, weight, x, row_mask=None, checked=True).tolist() == [1, 0]
    assert importance.eq(1).all()
    assert sensitivity.add_(importance, weight, x, row_mask=None, checked=False) is None
    assert not importance[3].isfinite().any() and importance[4:].isfinite().all()


def test_an_output_that_overflows_its_dtype_is_found(few_multiprocessors):
    weight, x = torch.ones(20, 30).half(), torch.ones(150, 30).half()
    x[2] = 3000
    with pytest.raises(ValueError, match="^x: expected finite"):
        sensitivity_(torch.zeros(20, 30), weight, x)
    with backends.value_checks(False):
        assert not sensitivity_(torch.zeros(20, 30), weight, x).isfinite().any()


def test_sums_that_overflow_are_no_error():
    weight, x = torch.ones(2, 3), torch.full((40, 3), 3e18)
    weight[1] = 1e-9
    importance = sensitivity_(torch.zeros(2, 3), weight, x)
    assert importance[0].isinf().all() and importance[1].isfinite().all()


def test_parts_of_larger_matrices_and_parameters():
    large = torch.randn(60, 100).bfloat16()
    weight, x = torch.nn.Parameter(large[:20, 3:40]), large[::2, 50:87]
    importance = torch.zeros(37, 20).T
    sensitivity_(importance, weight, x)
    torch.testing.assert_close(importance.double(), added(weight.detach(), x), rtol=1e-5, atol=1e-5)
    assert not importance.requires_grad


def test_a_direct_call_does_not_leave_its_memory():
    for shapes, message in [
        (((3, 3), (3, 3), (2, 4)), r"x: expected shape \(2, 3\)"),
        (((3, 3), (4, 3), (2, 3)), r"weight: expected shape \(3, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            torch.ops.sparsekern.sensitivity_(*map(torch.zeros, shapes))
    with pytest.raises(ValueError, match="importance: expected .* of torch.float32"):
        torch.ops.sparsekern.sensitivity_(torch.zeros(3, 3).double(), torch.zeros(3, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"row_mask: expected shape \(2,\) of torch.bool"):
        torch.ops.sparsekern.sensitivity_(*map(torch.zeros, ((3, 3), (3, 3), (2, 3))), row_mask=torch.ones(3) > 0)
