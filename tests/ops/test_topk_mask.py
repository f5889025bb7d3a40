from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.ops import topk_mask
from sparsekern.ops.topk_mask import reference

from .strategies import AWKWARD, FLOATS, PROPERTY, best, matrices, with_nan


@PROPERTY
@given(scores=matrices(), share=st.floats(0, 1))
def test_row_scope_keeps_the_k_best_of_each_row(isa, scores, share):
    k = round(share * scores.shape[1])
    expected = [best(row, k) for row in scores.double().tolist()]
    assert topk_mask(scores, k).tolist() == expected
    assert reference(scores, k).tolist() == expected


@PROPERTY
@given(scores=matrices(), share=st.floats(0, 1))
def test_matrix_scope_keeps_the_k_best_of_all(isa, scores, share):
    k = round(share * scores.numel())
    expected = best(scores.double().flatten().tolist(), k)
    assert topk_mask(scores, k, scope="matrix").flatten().tolist() == expected
    assert reference(scores, k, scope="matrix").flatten().tolist() == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("ties", [False, True])
def test_larger_than_a_chunk(isa, generator, dtype, scope, ties):
    scores = torch.randn(7, 5003, generator=generator)
    scores = (scores.round() if ties else scores).to(dtype)
    for k in (1, 2500, 5002):
        k = k if scope == "row" else 7 * k
        assert torch.equal(topk_mask(scores, k, scope=scope), reference(scores, k, scope=scope))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "scope, shape, shares",
    [("row", (2, 30_001), (0.5,)), ("row", (2, 65_600), (0.9,)), ("matrix", (70, 1031), (0.0, 0.5, 1.0))],
)
def test_rows_and_matrices_that_many_threads_share(generator, dtype, scope, shape, shares):
    awkward = torch.tensor(AWKWARD)[torch.randint(len(AWKWARD), shape, generator=generator)]
    scores = torch.where(torch.rand(shape, generator=generator) < 0.3, awkward, torch.randn(shape, generator=generator)).to(dtype)
    for share in shares:
        k = round(share * (shape[1] if scope == "row" else scores.numel()))
        assert torch.equal(topk_mask(scores, k, scope=scope), reference(scores, k, scope=scope))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_scores_that_begin_inside_a_vector_of_memory(isa, generator, dtype, scope):
    for shape in ((5, 64), (33, 640)):
        scores = torch.randn(1 + math.prod(shape), generator=generator).to(dtype)[1:].view(shape)
        assert scores.is_contiguous() and scores.data_ptr() % 16 != 0
        assert torch.equal(topk_mask(scores, 31, scope=scope), reference(scores, 31, scope=scope))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_nothing_but_equal_scores(isa, dtype, scope):
    for value in (0.0, -1.0, math.inf, -math.inf):
        for shape in ((3, 70), (9, 2056)):
            scores = torch.full(shape, value, dtype=dtype)
            assert torch.equal(topk_mask(scores, 37, scope=scope), reference(scores, 37, scope=scope))


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_do_not_change_which_ties_are_kept(isa, threads, generator, dtype):
    scores = torch.randn(31, 997, generator=generator).round().to(dtype)
    expected = reference(scores, 15_000, scope="matrix")
    for count in (1, 2, 3, 5):
        threads(count)
        assert torch.equal(topk_mask(scores, 15_000, scope="matrix"), expected)


def test_ties_go_to_the_lower_index_and_both_zeros_are_equal(isa):
    scores = torch.tensor([[0.0, -0.0, 1.0, -0.0, 0.0], [math.inf, -math.inf, 5.0, math.inf, -1.0]])
    assert topk_mask(scores, 3).tolist() == [[True, True, True, False, False], [True, False, True, True, False]]
    assert topk_mask(scores, 5, scope="matrix").tolist() == [[True, False, True, False, False], [True, False, True, True, False]]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_empty(isa, shape, scope):
    assert topk_mask(torch.zeros(shape), 0, scope=scope).shape == shape


@pytest.mark.slow  # compiles C++
def test_compiles_with_inductor():
    scores = torch.randn(8, 33)
    compiled = torch.compile(lambda s: topk_mask(s.abs(), 11) & (s > -1), fullgraph=True, backend="inductor")
    assert torch.equal(compiled(scores), topk_mask(scores.abs(), 11) & (scores > -1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_the_first_nan_is_named(isa, dtype, scope):
    scores = with_nan(torch.ones(300, 70, dtype=dtype), (299, 0), (217, 69), (217, 33), (218, 1))
    for function in (topk_mask, reference):
        with pytest.raises(ValueError, match=r"^scores: expected no NaN, got nan at \[217, 33\]"):
            function(scores, 5, scope=scope)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3), 4), ValueError, r"k: expected 0 to 3 for scope 'row' of scores \(2, 3\), got 4"),
        ((torch.zeros(2, 3), 1.5), TypeError, "k: expected a whole number, got 1.5"),
        ((torch.zeros(2, 3), -1), ValueError, "k: expected 0 to 3 .* got -1"),
        ((torch.zeros(2, 3, dtype=torch.float64), 1), TypeError, "scores: expected dtype .* got float64"),
        ((torch.zeros(3), 1), ValueError, r"scores: expected 2 dimensions, got shape \(3,\)"),
        (([1.0], 1), TypeError, "scores: expected a tensor, got list"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        topk_mask(*arguments)


def test_scope_is_refused():
    with pytest.raises(ValueError, match="scope: expected one of row, matrix, got 'block'"):
        topk_mask(torch.zeros(2, 3), 1, scope="block")
    assert topk_mask(torch.zeros(2, 3), 6, scope="matrix").all()
