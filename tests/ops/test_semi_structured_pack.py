from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsekern.layouts.semi_structured import FORMATS
from sparsekern.ops import nm_mask, semi_structured_pack, semi_structured_unpack
from sparsekern.ops.semi_structured_pack import reference, sparse_weight
from sparsekern.ops.semi_structured_unpack import reference as unpack_reference

from .strategies import PROPERTY, bits, misaligned, with_nan

EVERY_DTYPE = pytest.mark.parametrize("dtype", FORMATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_golden(weight: torch.Tensor) -> None:
    """Values and metadata are PyTorch's to the bit, and come back as the same weight."""
    golden = sparse_semi_structured_from_dense_cutlass(weight.contiguous())
    for pack in (semi_structured_pack, reference):
        for got, want in zip(pack(weight), golden, strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape and bits(got) == bits(want)
    dense = sparse_semi_structured_to_dense_cutlass(*golden)
    for unpack in (semi_structured_unpack, unpack_reference):
        assert bits(unpack(*golden)) == bits(dense)
    assert torch.equal(dense, weight)


@EVERY_DTYPE
@pytest.mark.parametrize(("row_blocks", "column_blocks"), [(1, 1), (1, 2), (2, 3), (3, 1), (5, 37)])
def test_is_what_pytorch_makes(isa, generator, dtype, row_blocks, column_blocks):
    fmt = FORMATS[dtype]
    shape = (row_blocks * fmt.row_multiple, column_blocks * fmt.column_multiple)
    weight = sparse_weight(*shape, dtype, generator)
    assert_golden(weight)
    assert_golden(weight.T.contiguous().T)
    assert_golden(misaligned(weight))
    assert torch.equal(semi_structured_unpack(*map(misaligned, semi_structured_pack(weight))), weight)


@EVERY_DTYPE
def test_every_placement_of_non_zeros_and_both_zeros(isa, dtype):
    fmt = FORMATS[dtype]
    values = (0, 1, -128) if dtype is torch.int8 else (0.0, -0.0, 1.0, 2.0**-24, -math.inf)
    fits = [g for g in itertools.product(values, repeat=fmt.group) if sum(v != 0 for v in g) <= fmt.group // 2]
    weight = torch.zeros(fmt.row_multiple, fmt.column_multiple * (len(fits) // (fmt.column_multiple // fmt.group) + 1))
    weight[0, : len(fits) * fmt.group] = torch.tensor(fits).flatten()
    weight[-1] = weight[0].flip(0)
    assert_golden(weight.to(dtype))


@PROPERTY
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
)
def test_what_nm_mask_keeps_survives(isa, dtype, seed, rows, columns):
    weight = torch.randn(32 * rows, 32 * columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    pruned = torch.where(nm_mask(weight.abs()), weight, torch.zeros_like(weight))
    assert bits(semi_structured_unpack(*semi_structured_pack(pruned))) == bits(pruned)


def test_empty():
    for shape in ((0, 64), (64, 0)):
        for pack, unpack in ((semi_structured_pack, semi_structured_unpack), (reference, unpack_reference)):
            values, meta = pack(torch.zeros(shape, dtype=torch.bfloat16))
            assert values.numel() == meta.numel() == 0
            assert unpack(values, meta).shape == shape


def test_compiles(generator):
    weight = sparse_weight(32, 64, torch.bfloat16, generator)
    compiled = torch.compile(lambda w: semi_structured_unpack(*semi_structured_pack(w)) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), 2 * weight)


@EVERY_DTYPE
def test_a_group_that_does_not_fit_is_named(isa, generator, dtype):
    fmt = FORMATS[dtype]
    weight = sparse_weight(3 * fmt.row_multiple, 4 * fmt.column_multiple, dtype, generator)
    row, column = 2 * fmt.row_multiple + 5, 7 * fmt.group
    weight[row, column : column + fmt.group] = 1
    weight[row + 1, :] = 1
    message = (
        f"^weight: expected at most {fmt.group // 2} non-zeros in every {fmt.group} columns, got {fmt.group} "
        f"in row {row}, columns {column} to {column + fmt.group - 1}"
    )
    for pack in (semi_structured_pack, reference):
        with pytest.raises(ValueError, match=message):
            pack(weight)


@pytest.mark.parametrize("dtype", [d for d in FORMATS if d.is_floating_point])
def test_the_first_nan_is_named(isa, dtype):
    weight = with_nan(torch.zeros(96, 128, dtype=dtype), (95, 0), (50, 99), (50, 3))
    weight[0] = 1  # does not fit either, but a NaN is told first
    for pack in (semi_structured_pack, reference):
        with pytest.raises(ValueError, match=r"^weight: expected no NaN, got nan at \[50, 3\]"):
            pack(weight)


@pytest.mark.parametrize(
    ("shape", "dtype", "multiple"),
    [
        ((32, 16), torch.bfloat16, r"\(32, 32\) for bfloat16, got \(32, 16\)"),
        ((16, 32), torch.float16, r"\(32, 32\) for float16, got \(16, 32\)"),
        ((32, 24), torch.float32, r"\(32, 16\) for float32, got \(32, 24\)"),
        ((16, 32), torch.int8, r"\(16, 64\) for int8, got \(16, 32\)"),
    ],
)
def test_shape_is_refused(shape, dtype, multiple):
    with pytest.raises(ValueError, match=f"weight: expected a shape that is a multiple of {multiple}"):
        semi_structured_pack(torch.zeros(shape, dtype=dtype))


def test_dtype_and_dimensions_are_refused():
    with pytest.raises(TypeError, match="weight: expected dtype .* got float64"):
        semi_structured_pack(torch.zeros(32, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weight: expected 2 dimensions, got shape \(1, 32, 32\)"):
        semi_structured_pack(torch.zeros(1, 32, 32, dtype=torch.bfloat16))
