from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsekern.layouts.semi_structured import FORMATS
from sparsekern.ops import nm_mask, semi_structured_prune_pack, semi_structured_unpack
from sparsekern.ops.semi_structured_prune_pack import reference

from .strategies import AWKWARD, FLOATS, PROPERTY, bits, misaligned, with_nan

EVERY_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_golden(weight: torch.Tensor, scores: torch.Tensor | None = None) -> None:
    """What PyTorch makes of the weight that `nm_mask` prunes, to the bit."""
    pattern = "1:2" if weight.dtype is torch.float32 else "2:4"
    mask = nm_mask(weight.abs() if scores is None else scores, pattern)
    pruned = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))
    golden = sparse_semi_structured_from_dense_cutlass(pruned.contiguous())
    for prune_pack in (semi_structured_prune_pack, reference):
        for got, want in zip(prune_pack(weight, scores), golden, strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape and bits(got) == bits(want)


@EVERY_DTYPE
@pytest.mark.parametrize(("row_blocks", "column_blocks"), [(1, 1), (1, 2), (2, 3), (3, 1), (5, 37)])
@pytest.mark.parametrize("scores_dtype", [None, *FLOATS], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_is_what_pytorch_makes(isa, generator, dtype, row_blocks, column_blocks, scores_dtype):
    fmt = FORMATS[dtype]
    shape = (row_blocks * fmt.row_multiple, column_blocks * fmt.column_multiple)
    weight = torch.randn(shape, generator=generator).mul(3).round().to(dtype)
    scores = None if scores_dtype is None else torch.randn(shape, generator=generator).mul(3).round().to(scores_dtype)
    assert_golden(weight, scores)
    for moved in (misaligned, lambda matrix: matrix.T.contiguous().T):
        assert_golden(moved(weight), None if scores is None else moved(scores))


@EVERY_DTYPE
@pytest.mark.parametrize("scored", [False, True], ids=["by magnitude", "by scores"])
def test_every_group_of_awkward_values(isa, dtype, scored):
    fmt = FORMATS[dtype]
    values = (0.0, -0.0, 1.0, -1.0, 2.0**-24, -math.inf)
    groups = torch.tensor(list(itertools.product(values, repeat=fmt.group))).flatten()
    weight = torch.zeros(fmt.row_multiple, fmt.column_multiple * math.ceil(len(groups) / fmt.column_multiple))
    weight[0, : len(groups)] = groups
    weight[-1] = weight[0].flip(0)
    scores = weight.roll(1, dims=1).flip(1) if scored else None
    assert_golden(weight.to(dtype), scores)


@PROPERTY
@given(dtype=st.sampled_from(FLOATS), scored=st.booleans(), seed=st.integers(0, 2**32), rows=st.integers(1, 2))
def test_awkward_values(isa, dtype, scored, seed, rows):
    generator = torch.Generator().manual_seed(seed)
    shape = (32 * rows, 64)
    weight, scores = (torch.tensor(AWKWARD)[torch.randint(len(AWKWARD), shape, generator=generator)] for _ in range(2))
    assert_golden(weight.to(dtype), scores if scored else None)


def test_ties_go_to_the_lower_column(isa):
    weight = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0, -2.0, 2.0, 2.0]).repeat(32, 4).bfloat16()
    assert semi_structured_unpack(*semi_structured_prune_pack(weight))[0, :8].tolist() == [1.0, -1.0, 0.0, 0.0, 0.0, -2.0, 2.0, 0.0]
    assert semi_structured_unpack(*semi_structured_prune_pack(weight, torch.ones(32, 32)))[0, :8].tolist() == [
        1.0,
        -1.0,
        0.0,
        0.0,
        0.0,
        -2.0,
        0.0,
        0.0,
    ]


def test_scores_may_be_negative(isa):
    weight = torch.arange(1.0, 5.0).repeat(32, 8).half()
    values, meta = semi_structured_prune_pack(weight, torch.tensor([-3.0, -1.0, -math.inf, -2.0]).repeat(32, 8))
    assert semi_structured_unpack(values, meta)[0, :4].tolist() == [0.0, 2.0, 0.0, 4.0]


def test_empty():
    for shape in ((0, 64), (64, 0)):
        for prune_pack in (semi_structured_prune_pack, reference):
            values, meta = prune_pack(torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape))
            assert values.numel() == meta.numel() == 0


def test_compiles(generator):
    weight = torch.randn(32, 64, generator=generator).bfloat16()
    compiled = torch.compile(lambda w, s: semi_structured_prune_pack(w * 2, s), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(weight, weight.float()), semi_structured_prune_pack(weight * 2, weight), strict=True):
        assert torch.equal(got, want)


@EVERY_DTYPE
def test_the_first_nan_is_named(isa, dtype):
    clean = torch.zeros(96, 128, dtype=dtype)
    bad = with_nan(clean, (95, 0), (50, 99), (50, 3))
    for prune_pack in (semi_structured_prune_pack, reference):
        with pytest.raises(ValueError, match=r"^weight: expected no NaN, got nan at \[50, 3\]"):
            prune_pack(bad)
        with pytest.raises(ValueError, match=r"^weight: expected no NaN, got nan at \[50, 3\]"):
            prune_pack(bad, with_nan(clean, (0, 0)))
        with pytest.raises(ValueError, match=r"^scores: expected no NaN, got nan at \[50, 3\]"):
            prune_pack(clean, bad)


def test_arguments_are_refused():
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="weight: expected dtype float32 or bfloat16 or float16, got int8"):
        semi_structured_prune_pack(weight.to(torch.int8))
    with pytest.raises(ValueError, match=r"weight: expected a shape that is a multiple of \(32, 32\) for bfloat16, got \(16, 64\)"):
        semi_structured_prune_pack(weight[:16])
    with pytest.raises(TypeError, match="scores: expected dtype .* got int64"):
        semi_structured_prune_pack(weight, weight.long())
    with pytest.raises(ValueError, match=r"scores: expected shape \(32, 64\), got \(64, 32\)"):
        semi_structured_prune_pack(weight, weight.T)
    with pytest.raises(ValueError, match="scores: expected device (cpu|cuda:0), got meta"):
        semi_structured_prune_pack(weight, weight.to("meta"))
