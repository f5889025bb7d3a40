from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import sensitivity, sensitivity_

from .strategies import FLOATS, INTERPRETED, PROPERTY


def token_by_token(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The definition: each token's `|W * (y x^T)|`, in float64."""
    weight, x = weight.double(), x.double()
    total = torch.zeros_like(weight)
    for token in x:
        total += (weight * torch.outer(weight @ token, token)).abs()
    return total


@PROPERTY
@given(
    tokens=st.integers(0, 20),
    rows=st.integers(0, 40),
    features=st.integers(0, 40),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
    masked=st.booleans(),
)
def test_any_size(tokens, rows, features, dtype, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, features, generator=generator).to(dtype)
    x = torch.randn(tokens, features, generator=generator).to(dtype)
    row_mask = torch.rand(tokens, generator=generator) > 0.3 if masked else None
    before = torch.rand(rows, features, generator=generator)
    importance = before.clone()
    assert sensitivity_(importance, weight, x, row_mask=row_mask) is importance
    expected = before + token_by_token(weight, x if row_mask is None else x[row_mask])
    # An output of nearly zero is the rounding of what cancels in it: hence the sizes without cancellation.
    sizes = before + weight.abs().double() * ((x.double().abs() @ weight.double().abs().T).T @ x.double().abs())
    rounded = INTERPRETED or x.is_cuda  # outputs of a half dtype have that dtype
    precision = torch.finfo(dtype).eps if rounded and dtype != torch.float32 else 1e-6
    assert ((importance - expected).abs() <= precision * sizes).all()


def test_it_is_the_gradient_of_each_tokens_output_energy(generator):
    weight, x = torch.randn(7, 12, generator=generator), torch.randn(9, 12, generator=generator)
    expected = torch.zeros_like(weight)
    for token in x:
        variable = weight.clone().requires_grad_()
        ((variable @ token).square().sum() / 2).backward()
        expected += (weight * variable.grad).abs()
    torch.testing.assert_close(sensitivity_(torch.zeros(7, 12), weight, x), expected, rtol=1e-5, atol=1e-5)


def test_tiles_do_not_show(generator, monkeypatch):
    weight = torch.randint(-8, 9, (37, 20), generator=generator).float()
    x = torch.randint(-8, 9, (50, 20), generator=generator).float()
    row_mask = torch.arange(50) % 7 > 0
    whole = sensitivity_(torch.zeros(37, 20), weight, x, row_mask=row_mask)
    monkeypatch.setattr(sensitivity, "TILES", dict.fromkeys(("cpu", "cuda"), (16, 10)))
    tiled = sensitivity_(torch.zeros(37, 20), weight, x, row_mask=row_mask)
    assert torch.equal(tiled, whole)  # of whole numbers every sum is exact


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["weight", "x"])
def test_the_first_value_that_is_not_finite_is_named_and_nothing_changes(bad, name):
    call = {"weight": torch.ones(30, 40), "x": torch.ones(50, 40)}
    call["x"][3, 3] = math.nan  # masked out
    call[name][20, 7] = bad
    importance = torch.ones(30, 40)
    with pytest.raises(ValueError, match=rf"^{name}: expected finite values, got {bad} at \[20, 7\]"):
        sensitivity_(importance, **call, row_mask=torch.arange(50) != 3)
    assert importance.eq(1).all()


def test_an_output_that_overflows_is_named():
    x = torch.ones(5, 2)
    x[1] = x[3, 1] = 1e30
    with pytest.raises(ValueError, match="^x: expected finite outputs, but output 1 of row 3 overflows torch.float32"):
        sensitivity_(torch.zeros(2, 2), torch.tensor([[1.0, 0], [0, 1e30]]), x, row_mask=torch.arange(5) != 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"importance": torch.zeros(3)}, ValueError, r"importance: expected 2 dimensions, got shape \(3,\)"),
        ({"importance": torch.zeros(3, 2).double()}, TypeError, "importance: expected dtype float32, got float64"),
        ({"weight": torch.zeros(3, 4)}, ValueError, r"weight: expected shape \(3, 2\), got \(3, 4\)"),
        ({"weight": torch.zeros(3, 2).double()}, TypeError, "weight: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"x": torch.zeros(4, 3)}, ValueError, r"x: expected shape \('any', 2\), got \(4, 3\)"),
        ({"x": torch.zeros(4, 2).bfloat16()}, TypeError, "x: expected dtype float32, got bfloat16"),
        ({"row_mask": torch.ones(3) > 0}, ValueError, r"row_mask: expected shape \(4,\), got \(3,\)"),
    ],
)
def test_refusals(change, error, message):
    call = {"importance": torch.zeros(3, 2), "weight": torch.zeros(3, 2), "x": torch.zeros(4, 2), **change}
    with pytest.raises(error, match=message):
        sensitivity_(**call)


def test_a_direct_call_with_wrong_shapes_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.sparsekern.sensitivity_(torch.zeros(3, 3), torch.zeros(3, 3), torch.zeros(2, 4))
