"""Linears that several processes solve together: the same bits for any number of processes, close to those of whole linears."""

from __future__ import annotations

import pytest
import torch

from sparsekern import ALPS, SparseGPT, Wanda
from sparsekern.pruning.blockwise.dealing import TOGETHER
from sparsekern.pruning.blockwise.sharing import SharedSolve
from sparsekern.ranks import World

from .linears import SHAPES, jobs_of, linears, solve_alone, solve_shared, solver_of

SHARED = "tests.ranks.linears:solve_shared"
CASES = [
    (SparseGPT(), "2:4", torch.float32),
    (SparseGPT(), "2:4", torch.bfloat16),
    (SparseGPT(block_size=24), "0.5", torch.float32),  # one count in each block of columns, for all rows
    (SparseGPT(), "0.3", torch.bfloat16),
    (SparseGPT(scope="matrix"), "0.5", torch.float32),  # whole linears
    (SparseGPT(scope="row"), "0.5", torch.float32),
    (ALPS(), "2:4", torch.float32),
    (ALPS(), "0.5", torch.float32),  # one count for all rows, some of which other processes solve
    (ALPS(scope="row"), "0.3", torch.bfloat16),
    (Wanda(), "0.5", torch.float32),  # whose errors are measured by a Gram matrix
]


@pytest.mark.parametrize(("method", "pattern", "dtype"), CASES, ids=str)
def test_the_number_of_processes_changes_no_bit(ranks, method, pattern, dtype):
    expected, errors, sent = solve_shared(0, method, pattern, dtype)
    assert sent == 0
    for size in (2, 4):
        total = 0
        for weights, found, sent in ranks.run(size, SHARED, method, pattern, dtype):
            assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
            assert found == errors
            total += sent
        assert total >= sum(rows * features for rows, features in SHAPES.values()) * dtype.itemsize  # each piece once


@pytest.mark.parametrize(("method", "pattern", "dtype"), CASES, ids=str)
def test_the_solution_is_that_of_whole_linears(method, pattern, dtype):
    alone, (weights, errors, _) = solve_alone(method, pattern, dtype), solve_shared(0, method, pattern, dtype)
    close = {"rtol": 0.02, "atol": 0.02} if isinstance(method, ALPS) else {"rtol": 1e-3, "atol": 1e-4}  # its fit ends tile by tile
    for name, bits in weights.items():
        assert torch.equal(bits.view(dtype) == 0, alone.weights[name] == 0)
        torch.testing.assert_close(bits.view(dtype), alone.weights[name], **close)
        assert errors[name] == pytest.approx(alone.layers[name].error, rel=1e-4)


@pytest.mark.parametrize("method", [SparseGPT(), Wanda()], ids=str)
def test_the_cases_pass_a_factor_on(method):
    """That of Wanda measures the errors, and is computed once all the same."""
    found = linears(torch.float32)
    dealt = SharedSolve(solver_of(method, "2:4", found), World(0, 2), 8, jobs_of(found)).dealt
    assert any(dealt.passed_on(index) for index in range(3))
    assert {place.rank for places in dealt.places for place in places} == {0, 1}


@pytest.mark.parametrize(("size", "expected"), [(1, []), (2, []), (4, ["down", "q"])])
def test_the_longest_linears_are_solved_together_where_that_takes_less_time(size, expected):
    found = linears(torch.float32)
    shared = SharedSolve(solver_of(ALPS(), "2:4", found), World(0, size), 8, jobs_of(found))
    together = {piece.linear.job.linear.name for piece in shared._pieces if piece.place.turn == TOGETHER}
    assert sorted(together) == expected


def test_a_failure_in_rows_that_one_rank_solves_is_raised_on_all(ranks):
    answers = ranks.run(4, "tests.ranks.linears:fail_together", 2)
    assert [answer[:2] for answer in answers] == [("ValueError", "rank 2: down: dual: a bug")] * 4


def test_a_failure_on_the_rank_that_computes_a_factor_is_raised_on_all(ranks):
    answers = ranks.run(2, SHARED, SparseGPT(), "2:4", torch.float32, 1)
    assert [answer[0] for answer in answers] == ["ValueError"] * 2
    assert answers[0][1] == answers[1][1] and answers[0][1].startswith("rank 1: ") and "gram" in answers[0][1]
