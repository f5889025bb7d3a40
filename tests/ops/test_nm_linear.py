from __future__ import annotations

import math

import pytest
import torch

from sparsekern.layouts.packed_rows import pack_nm_rows
from sparsekern.ops import nm_linear

from .strategies import FEW_KERNELS, FLOATS, INTERPRETED
from .test_bitmask_linear import assert_close_to_exact

PATTERNS = (
    [(2, 4), (3, 7), (1, 16)]
    if FEW_KERNELS
    else [(2, 4), (1, 2), (2, 3), (1, 4), (3, 4), (3, 7), (4, 8), (5, 9), (1, 16), (15, 16)]
)


def nm_weight(rows: int, groups: int, n: int, m: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """With fewer than N non-zeros in some groups."""
    dense = torch.randn(rows, groups, m, generator=generator)
    kept = torch.rand(dense.shape, generator=generator).argsort(-1).argsort(-1) < n
    kept &= torch.rand(dense.shape, generator=generator) < 0.9
    return (dense * kept).flatten(1).to(dtype)


def test_the_layout_is_what_files_hold():
    row = torch.zeros(1, 72)
    row[0, 1], row[0, 3], row[0, 4], row[0, 33], row[0, 71] = 1, 2, 3, 4, 5
    packed = pack_nm_rows(row, 2, 4)
    # Group 0 stores columns 1 and 3, group 1 column 4 and a zero, group 8 a zero of column 32 and column 33.
    assert packed["values"][0].nonzero().flatten().tolist() == [0, 1, 2, 17, 35]
    assert packed["values"][0][[0, 1, 2, 17, 35]].tolist() == [1, 2, 3, 4, 5] and packed["values"].shape == (1, 48)
    codes = packed["codes"][0].tolist()
    empty, first = 0b0100, 0b1101  # positions 0, 1 and 1, 3
    assert codes[0] & 0xFFFFFFFF == sum(empty << 4 * i for i in range(1, 8)) | first
    assert codes[2] == empty | 0b1100 << 4  # 0, 3; what fills the block is zero
    half = pack_nm_rows(row.half(), 2, 4)
    assert half["values"].shape == (1, 64) and half["codes"][0].tolist() == [*codes, 0]
    # Value d of a block and value 16 + d share a slot.
    assert half["values"][0].nonzero().flatten().tolist() == [0, 2, 3, 4, 38]
    assert half["values"][0][[0, 2, 4, 3, 38]].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, m", PATTERNS)
def test_equals_the_dense_product(isa, poisoned, generator, n, m, dtype):
    for tokens in (0, 1, 2, 7, 33):
        for rows, groups in ((1, 1), (19, 40)) + (() if INTERPRETED else ((49, 5),)):
            weight = nm_weight(rows, groups, n, m, dtype, generator)
            x = torch.randn(tokens, groups * m, generator=generator).to(dtype)
            bias = torch.randn(rows, generator=generator).to(dtype)
            packed = pack_nm_rows(weight, n, m).values()
            assert_close_to_exact(nm_linear(x, *packed, n, m), x, weight)
            assert_close_to_exact(nm_linear(x, *packed, n, m, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 16])
def test_whole_steps_of_columns(isa, poisoned, generator, tokens, dtype):
    """What the kernel of CUDA devices takes: a single step, several for each warp, and rows that few blocks share."""
    for rows, groups, n in ((19, 32, 2), (5, 32 * 9, 2), (33, 64, 2), (19, 64, 1), (5, 64 * 5, 1)):
        weight = nm_weight(rows, groups, n, 4, dtype, generator)
        x = torch.randn(tokens, groups * 4, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        assert_close_to_exact(nm_linear(x, *pack_nm_rows(weight, n, 4).values(), n, 4, bias), x, weight, bias)


def test_sizes_of_zero_and_leading_dimensions(isa, generator):
    for shape, rows, groups in (((3, 0), 4, 0), ((0, 8), 2, 2), ((2, 8), 0, 2), ((8,), 3, 2), ((2, 0, 8), 3, 2), ((2, 3, 8), 3, 2)):
        weight = nm_weight(rows, groups, 2, 4, torch.float32, generator)
        x = torch.randn(shape, generator=generator)
        y = nm_linear(x, *pack_nm_rows(weight, 2, 4).values(), 2, 4)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight))


def test_more_tokens_than_memory_where_there_is_nothing_to_multiply(isa):
    """The wrapper refuses such a shape; a direct call must not crash."""
    x = torch.empty(2**58, 0)
    assert torch.ops.sparsekern.nm_linear(x, *pack_nm_rows(torch.empty(0, 0), 2, 4).values(), 2, 4).shape == (2**58, 0)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, m", [(2, 4), (3, 7)])
def test_nan_and_inf_spread_where_a_weight_is_kept(isa, dtype, tokens, n, m):
    weight = torch.ones(40, 10, m, dtype=dtype)
    weight[..., n:] = 0
    weight = weight.flatten(1)
    x = torch.ones(tokens, 10 * m, dtype=dtype)
    spoiled = weight.clone()
    spoiled[3, 1], spoiled[20, 9 * m], spoiled[21, 0] = math.nan, math.inf, -math.inf
    y = nm_linear(x, *pack_nm_rows(spoiled, n, m).values(), n, m)
    assert y[:, 3].isnan().all() and (y[:, 20] == math.inf).all() and (y[:, 21] == -math.inf).all()
    assert y.isfinite().sum() == 37 * tokens
    x[0, 9 * m] = -math.inf
    y = nm_linear(x, *pack_nm_rows(weight, n, m).values(), n, m)
    assert (y[0] == -math.inf).all() and y[1:].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, m", PATTERNS)
def test_no_codes_lead_the_kernel_out_of_x(isa, generator, n, m, dtype):
    """Whatever comes of it, with the sanitized build in particular it is no read of other memory."""
    rows = 5 if INTERPRETED else 21  # of two tiles, which are read together
    values, codes = pack_nm_rows(nm_weight(rows, 37, n, m, dtype, generator), n, m).values()
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 37 * m, generator=generator).to(dtype)
        try:
            y = nm_linear(x, values, torch.full_like(codes, -1), n, m)
            assert y.shape == (tokens, rows)
        except (ValueError, RuntimeError) as error:
            assert "codes: expected positions below m" in str(error) or "index" in str(error)


def test_what_is_refused(generator):
    x = torch.ones(2, 72)
    values, codes = pack_nm_rows(nm_weight(20, 18, 2, 4, torch.float32, generator), 2, 4).values()
    for wrong, message in (
        ((x.double(), values, codes, 2, 4), "x: expected dtype"),
        ((x.sum(), values, codes, 2, 4), r"x: expected \[\.\.\., in_features\], got \(\)"),
        ((x[:, :70], values, codes, 2, 4), "x: expected features divisible by m = 4, got 70"),
        ((x, values.half(), codes, 2, 4), "values: expected dtype float32, got float16"),
        ((x, values, codes, 1, 4), r"values: expected shape \('any', 32\), got \(20, 48\)"),
        ((x, values, codes[:, 1:], 2, 4), r"codes: expected shape \(20, 3\), got \(20, 2\)"),
        ((x, values, codes, 4, 4), r"n, m: expected n < m <= 16 .*, got 4:4"),
        ((x, values, codes, 2, 24), r"n, m: expected n < m <= 16 .*, got 2:24"),
        ((x, values, codes, 0, 4), "n: expected at least 1, got 0"),
        ((x, values, codes, 2, 4, torch.ones(19)), r"bias: expected shape \(20,\), got \(19,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nm_linear(*wrong)
