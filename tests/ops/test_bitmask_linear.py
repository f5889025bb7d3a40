from __future__ import annotations

import math

import pytest
import torch

from sparsekern.layouts.packed_rows import SLACK, pack_bitmask_rows
from sparsekern.ops import bitmask_linear

from .strategies import FEW_KERNELS, FLOATS

# The CPU kernels take 8 tokens together, those of CUDA devices 16.
TOKENS = [0, 1, 16, 17] if FEW_KERNELS else [0, 1, 2, 3, 7, 8, 15, 16, 17, 50]
ORDER = ("values", "bitmask", "starts", "order")


def packed_of(weight: torch.Tensor) -> list[torch.Tensor]:
    packed = pack_bitmask_rows(weight)
    return [packed[name] for name in ORDER]


def sparse(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, zeros: float = 0.5) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(rows, columns, generator=generator) >= zeros)).to(dtype)


def assert_close_to_exact(y, x, weight, bias=None):
    """Within the rounding of the output, and of float32 sums."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = torch.finfo(y.dtype).eps * exact.abs() + 2e-6 * size + torch.finfo(y.dtype).tiny
    assert y.dtype == x.dtype and ((y.double() - exact).abs() <= bound).all()


def test_the_layout_is_what_files_hold():
    """Row 1 has the fewest non-zeros and comes first, beside row 2; the longer row's last value has a zero beside it."""
    weight = torch.tensor([[1.0, 2, 0, 3], [0, 4, 0, 0], [0, 0, 5, 6]]).bfloat16()
    packed = pack_bitmask_rows(weight)
    assert packed["order"].tolist() == [1, 2, 0] and packed["order"].dtype is torch.int32
    assert packed["bitmask"].tolist() == [[0b0010], [0b1100], [0b1011]] and packed["bitmask"].dtype is torch.int64
    assert packed["values"].tolist() == [4, 5, 0, 6, 1, 0, 2, 0, 3, 0] + [0] * (2 * SLACK)
    assert packed["starts"].tolist() == [0, 5]
    packed = pack_bitmask_rows(weight.float())
    assert packed["values"].tolist() == [4, 5, 6, 1, 2, 3] + [0] * SLACK and packed["starts"].tolist() == [0, 6]
    wide = torch.zeros(17, 65)
    wide[3, 63], wide[3, 64] = 1, -1
    packed = pack_bitmask_rows(wide)
    assert packed["bitmask"][16].tolist() == [-(2**63), 1] and packed["starts"].tolist() == [0, 0, 2]
    assert packed["order"].tolist() == [*range(3), *range(4, 17), 3]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_dense_product(isa, poisoned, generator, tokens, dtype):
    for rows, columns, zeros in ((1, 1, 0.0), (33, 200, 0.5), (17, 64, 0.9), (30, 129, 0.0)):
        weight = sparse(rows, columns, dtype, generator, zeros)
        weight[rows // 2 : rows // 2 + 5] = -0.0
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        assert_close_to_exact(bitmask_linear(x, *packed_of(weight)), x, weight)
        assert_close_to_exact(bitmask_linear(x, *packed_of(weight), bias), x, weight, bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_many_rows_on_threads(isa, threads, generator, tokens, dtype):
    threads(3)
    weight = sparse(301, 523, dtype, generator) * (torch.arange(301) % 7 > 0)[:, None]  # whole rows of zeros
    x = torch.randn(tokens, 523, generator=generator).to(dtype)
    assert_close_to_exact(bitmask_linear(x, *packed_of(weight)), x, weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [2, 16])
def test_neighbouring_rows_with_zeros_in_other_places(isa, poisoned, generator, tokens, dtype):
    """The rows that share slots need other slots for the same columns; the last columns are dense."""
    columns = 64 * 11
    half = torch.arange(columns) < columns // 2
    weight = torch.randn(18, columns, generator=generator)
    weight[0::2] *= half
    weight[1::2] *= ~half
    weight[16:] = torch.randn(2, columns, generator=generator)
    weight = weight.to(dtype)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    assert_close_to_exact(bitmask_linear(x, *packed_of(weight)), x, weight)


def test_sizes_of_zero_and_leading_dimensions(isa, generator):
    for shape, rows, columns in (
        ((3, 0), 4, 0),
        ((0, 5), 2, 5),
        ((2, 5), 0, 5),
        ((5,), 3, 5),
        ((2, 0, 5), 3, 5),
        ((2, 3, 5), 3, 5),
    ):
        weight = sparse(rows, columns, torch.float32, generator)
        x = torch.randn(shape, generator=generator)
        torch.testing.assert_close(bitmask_linear(x, *packed_of(weight)), torch.nn.functional.linear(x, weight))


def test_more_tokens_than_memory_where_there_is_nothing_to_multiply(isa):
    """The wrapper refuses such a shape; a direct call must not crash."""
    x = torch.empty(2**58, 0)
    assert torch.ops.sparsekern.bitmask_linear(x, *packed_of(torch.empty(0, 0))).shape == (2**58, 0)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_spread_where_a_weight_is_kept(isa, dtype, tokens):
    weight = torch.ones(40, 70, dtype=dtype)
    x = torch.ones(tokens, 70, dtype=dtype)
    weight[3, 5], weight[20, 69], weight[21, 0] = math.nan, math.inf, -math.inf
    y = bitmask_linear(x, *packed_of(weight))
    assert y[:, 3].isnan().all() and (y[:, 20] == math.inf).all() and (y[:, 21] == -math.inf).all()
    assert y.isfinite().sum() == 37 * tokens
    x[0, 69] = -math.inf
    y = bitmask_linear(x, *packed_of(torch.ones_like(weight)))
    assert (y[0] == -math.inf).all() and y[1:].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS[1:2] if FEW_KERNELS else FLOATS)
def test_contradicting_tensors_cannot_lead_the_kernel_out_of_them(isa, generator, dtype):
    """Nothing but an error may come of this, with the sanitized build in particular."""
    values, bitmask, starts, order = packed_of(sparse(40, 700, dtype, generator, 0.9))
    for tokens in (1, 9, 40):
        x = torch.randn(tokens, 700, generator=generator).to(dtype)
        for first_wrong in (0, 39):  # all rows, or only the last, whose tile is read together with a sound one
            wrong_bits = bitmask.clone()
            wrong_bits[first_wrong:] = -1
            with pytest.raises(ValueError, match="bitmask: expected no more set bits than there are values"):
                bitmask_linear(x, values, wrong_bits, starts, order)
        for wrong in (-1, 2**62, int(starts[-1]) + 1):
            with pytest.raises(ValueError, match="starts: expected ascending offsets of at most"):
                moved = starts.clone()
                moved[1] = wrong
                torch.ops.sparsekern.bitmask_linear(x, values, bitmask, moved, order)
        for wrong in (-1, 40, -(2**31)):
            with pytest.raises(ValueError, match=f"order: expected rows from 0 to 39, got {wrong}"):
                moved = order.clone()
                moved[7] = wrong
                torch.ops.sparsekern.bitmask_linear(x, values, bitmask, starts, moved)


def test_what_is_refused(generator):
    x = torch.ones(2, 70)
    values, bitmask, starts, order = packed_of(sparse(20, 70, torch.float32, generator))
    for wrong, message in (
        ((x.double(), values, bitmask, starts, order), "x: expected dtype"),
        ((x.sum(), values, bitmask, starts, order), r"x: expected \[\.\.\., in_features\], got \(\)"),
        ((x, values.bfloat16(), bitmask, starts, order), "values: expected dtype float32, got bfloat16"),
        ((x[:, :64], values, bitmask, starts, order), r"bitmask: expected shape \(20, 1\), got \(20, 2\)"),
        (
            (x, values[: SLACK - 1], bitmask, starts, order),
            "values: expected a whole number of slots, 64 of them spare, got 63 values",
        ),
        ((x, values, bitmask, starts[1:], order), r"starts: expected shape \(3,\), got \(2,\)"),
        ((x, values, bitmask, starts, order.long()), "order: expected dtype int32, got int64"),
        ((x, values, bitmask, starts, order, torch.ones(19)), r"bias: expected shape \(20,\), got \(19,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            bitmask_linear(*wrong)
