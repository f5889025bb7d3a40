from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import nm_mask
from sparsekern.ops.nm_mask import reference
from sparsekern.pattern import NM

from .strategies import FLOATS, PROPERTY, best, matrices, misaligned, with_nan

# Powers of two have their own code for each instruction set; 3, 12 and 63 do not fit a register evenly.
PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (7, 8), (8, 16), (1, 3), (5, 12), (16, 32), (40, 63), (2, 64)]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_keeps_the_n_best_of_every_m(isa, n, m):
    @PROPERTY
    @given(scores=st.integers(0, 9).flatmap(lambda groups: matrices(columns=st.just(groups * m), rows=st.integers(0, 3))))
    def check(scores):
        expected = [best(group, n) for group in scores.double().reshape(-1, m).tolist()]
        assert nm_mask(scores, f"{n}:{m}").reshape(-1, m).tolist() == expected
        assert reference(scores, n, m).reshape(-1, m).tolist() == expected

    check()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:5"])
def test_larger_than_a_chunk(isa, generator, dtype, pattern):
    scores = torch.randn(9, 4040, generator=generator).mul(3).round().to(dtype)
    n, m = map(int, pattern.split(":"))
    assert torch.equal(nm_mask(scores, pattern), reference(scores, n, m))
    assert torch.equal(nm_mask(misaligned(scores), pattern), reference(scores, n, m))


def test_ties_go_to_the_lower_column(isa):
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, -0.0, 0.0, -0.0, -0.0, 2.0, 0.0, 0.0]])
    assert nm_mask(scores).tolist() == [[True, True, False, False] * 2 + [True, True, False, False]]


def test_pattern_object():
    assert nm_mask(torch.ones(1, 4), NM(1, 4)).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_first_nan_is_named(isa, dtype):
    scores = with_nan(torch.ones(300, 72, dtype=dtype), (299, 0), (217, 69), (217, 33), (218, 1))
    with pytest.raises(ValueError, match=r"^scores: expected no NaN, got nan at \[217, 33\]"):
        nm_mask(scores, "2:4")
    with pytest.raises(ValueError, match=r"^scores: expected no NaN, got nan at \[217, 33\]"):
        reference(scores, 2, 4)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2:4", "scores: expected input features divisible by M=4 for pattern '2:4', got 6"),
        ("4:2", "pattern: expected N:M with 1 <= N < M, which keeps N of every M weights, got '4:2'"),
        ("0:4", "pattern: .* got '0:4'"),
        ("2:128", "pattern: expected M of at most 64, got '2:128'"),
        ("0.5", "pattern: expected 'N:M', got '0.5'; topk_mask selects without structure"),
        ("two", "pattern: expected 'N:M' .* got 'two'"),
    ],
)
def test_pattern_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        nm_mask(torch.ones(2, 6), pattern)


def test_dtype_is_refused():
    with pytest.raises(TypeError, match="scores: expected dtype float32 or bfloat16 or float16, got int64"):
        nm_mask(torch.ones(2, 4, dtype=torch.int64))
