from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import gram_, gram_symmetrize_
from sparsekern.ops.gram import reference

from .strategies import FLOATS, INTERPRETED, PROPERTY


def in_float64(x, row_mask=None) -> torch.Tensor:
    x = (x if row_mask is None else x[row_mask]).double()
    return (x.T @ x).tril()


@PROPERTY
@given(
    tokens=st.integers(0, 90),
    features=st.integers(0, 140),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
    masked=st.booleans(),
    alpha=st.sampled_from([1.0, -0.5, 2.0]),
)
def test_any_size(isa, tokens, features, dtype, seed, masked, alpha):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator).to(dtype)
    row_mask = torch.rand(tokens, generator=generator) > 0.3 if masked else None
    before = torch.randn(features, features, generator=generator)
    gram = before.clone()
    assert gram_(gram, x, row_mask=row_mask, alpha=alpha) is gram
    expected = before.tril().double() + alpha * in_float64(x, row_mask)
    magnitude = before.tril().abs().double() + abs(alpha) * in_float64(x.abs(), row_mask)
    assert ((gram.tril().double() - expected).abs() <= 1e-6 * magnitude).all()
    assert torch.equal(gram.triu(1), before.triu(1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_less_accurate_than_the_product_in_float32(isa, generator, dtype):
    tokens, features = (1000, 70) if INTERPRETED else (5000, 150)
    x = (torch.randn(tokens, features, generator=generator) + 0.3).to(dtype)
    expected = in_float64(x)
    ours = (gram_(torch.zeros(features, features), x).double() - expected).norm()
    # On a GPU torch's product of half inputs accumulates in the tensor cores, as ours does.
    in_tensor_cores = x.is_cuda and dtype != torch.float32
    product = torch.mm(x.T, x, out_dtype=torch.float32) if in_tensor_cores else x.float().T @ x.float()
    theirs = (product.tril().double() - expected).norm()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_inputs_are_exact(isa, dtype):
    # 1 + eps squared needs every bit of both significands; any rounding of the inputs or of the product would show.
    value = 1 + torch.finfo(dtype).eps
    x = torch.full((1, 20), value, dtype=dtype)
    assert gram_(torch.zeros(20, 20), x).tril().unique().tolist() == [0.0, value * value]


def test_batches_accumulate(isa, generator):
    x = torch.randn(300, 70, generator=generator)
    whole = gram_(torch.zeros(70, 70), x)
    parts = torch.zeros(70, 70)
    for part in x.split(77):
        gram_(parts, part)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-3)


def test_symmetrized_it_is_the_gram_matrix(isa, generator):
    x = torch.randn(100, 33, generator=generator)
    torch.testing.assert_close(gram_symmetrize_(gram_(torch.zeros(33, 33), x)), x.T @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_first_value_that_is_not_finite_is_named_and_on_a_cpu_nothing_changes(isa, dtype, bad, request):
    x = torch.ones(600, 40, dtype=dtype)
    x[3, 3] = math.nan  # masked out
    x[590, 2] = x[400, 39] = x[400, 7] = bad
    row_mask = torch.arange(600) != 3
    for function in (gram_, reference):
        gram = torch.ones(40, 40)
        with pytest.raises(ValueError, match=rf"^x: expected finite values, got {bad} at \[400, 7\]"):
            function(gram, x, row_mask=row_mask)
        if function is reference or not request.config.getoption("--kernels"):
            assert gram.eq(1).all()


def test_products_that_overflow_are_no_error(isa):
    x = torch.tensor([[1e30, 1.0], [0.0, 2.0]])
    gram = gram_(torch.zeros(2, 2), x)
    assert gram[0, 0] == math.inf or gram.is_cuda and gram[0, 0].isnan()  # tensor cores add pieces of either sign
    assert gram[1].tolist() == [torch.tensor(1e30).item(), 5.0]


@pytest.mark.parametrize(
    ("gram", "x", "options", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 3), {}, ValueError, r"gram: expected a square matrix, got shape \(3, 4\)"),
        (torch.zeros(3, 3).double(), torch.zeros(2, 3), {}, TypeError, "gram: expected dtype float32, got float64"),
        (torch.zeros(3, 3), torch.zeros(2, 4), {}, ValueError, r"x: expected shape \('any', 3\), got \(2, 4\)"),
        (torch.zeros(3, 3), torch.zeros(3), {}, ValueError, r"x: expected 2 dimensions, got shape \(3,\)"),
        (torch.zeros(3, 3), torch.zeros(2, 3).int(), {}, TypeError, "x: expected dtype float32 or bfloat16 or float16"),
        (torch.zeros(3, 3), torch.zeros(2, 3, device="meta"), {}, ValueError, r"x: expected device (cpu|cuda:0), got meta"),
        (torch.zeros(3, 3), [[1.0]], {}, TypeError, "x: expected a tensor, got list"),
        (torch.zeros(3, 3), torch.zeros(2, 3), {"row_mask": torch.ones(3) > 0}, ValueError, r"row_mask: expected shape \(2,\)"),
        (torch.zeros(3, 3), torch.zeros(2, 3), {"alpha": float("nan")}, ValueError, "alpha: expected a finite number, got nan"),
        (torch.zeros(3, 3), torch.zeros(2, 3), {"alpha": "1"}, TypeError, "alpha: expected a number, got '1'"),
        (torch.zeros(3, 3), torch.zeros(2, 3), {"row_mask": torch.ones(2)}, TypeError, "row_mask: expected dtype bool"),
    ],
)
def test_refusals(gram, x, options, error, message):
    with pytest.raises(error, match=message):
        gram_(gram, x, **options)


def test_a_direct_call_with_wrong_shapes_is_refused_by_the_kernel():
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.sparsekern.gram_(torch.zeros(3, 3), torch.zeros(2, 4))
