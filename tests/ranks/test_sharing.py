"""Linears that several processes solve together: the same bits for any number of processes, close to those of whole linears."""

from __future__ import annotations

import pytest
import torch

from sparsekern import ALPS, SparseGPT, Wanda
from sparsekern.pruning.blockwise import messages
from sparsekern.pruning.blockwise.dealing import TOGETHER
from sparsekern.pruning.blockwise.sharing import SharedSolve
from sparsekern.ranks import World

from .linears import SHAPES, jobs_of, linears, solve_alone, solve_in_place, solve_shared, solver_of

SHARED, IN_PLACE = "tests.ranks.linears:solve_shared", "tests.ranks.linears:solve_in_place"
CASES = [
    (SparseGPT(), "2:4", torch.float32),
    (SparseGPT(), "2:4", torch.bfloat16),
    (SparseGPT(block_size=24), "0.5", torch.float32),  # one count in each block of columns, for all rows
    (SparseGPT(), "0.3", torch.bfloat16),
    (SparseGPT(scope="matrix"), "0.5", torch.float32),  # a mask of the whole matrix, rows by tiles
    (SparseGPT(scope="matrix", keep_zeros=False), "0.3", torch.bfloat16),
    (SparseGPT(mask="magnitude"), "0.5", torch.float32),
    (SparseGPT(mask="zeros"), "0.001", torch.float32),
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


@pytest.mark.parametrize("method", [SparseGPT(), SparseGPT(keep_zeros=False), ALPS(keep_zeros=False)], ids=str)
def test_results_may_be_written_to_the_model_piece_by_piece(ranks, method):
    expected, errors, _ = solve_shared(0, method, "2:4", torch.float32)
    zeros = {linear.name: linear.weight == 0 for linear in linears(torch.float32)}
    lost = sum(int((zero & (expected[name] != 0)).sum()) for name, zero in zeros.items())
    assert bool(lost) != method.keep_zeros
    for answers in ([solve_in_place(0, method, "2:4", torch.float32)], ranks.run(4, IN_PLACE, method, "2:4", torch.float32)):
        for weights, found, counted in answers:
            assert all(torch.equal(weights[name], expected[name]) for name in expected) and found == errors
            assert tuple(counted) == (lost, sum(int(zero.sum()) for zero in zeros.values()))


@pytest.mark.parametrize("size", [40, 1000, 10**6])
def test_no_message_is_longer_than_the_limit_unless_a_row_is(size, monkeypatch):
    monkeypatch.setattr(messages, "MESSAGE", size)
    rows = torch.arange(60.0).view(6, 10)
    found = [part for part in messages.split_rows(rows)] + [torch.zeros(2, 3)]
    together = list(messages.messages(found))
    assert [id(part) for parts in together for part in parts] == [id(part) for part in found]
    assert torch.equal(torch.cat(found[:-1]), rows)
    assert all(sum(part.nbytes for part in parts) <= max(size, 40) for parts in together)


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


def test_a_block_is_dealt_by_the_seconds_that_the_last_one_took():
    """By its multiply-adds, `down` is as much work as all others. Here `o` took that long."""
    found = linears(torch.float32)
    solver = solver_of(ALPS(), "2:4", found)
    alone = {}
    for turn in range(2):
        shared = SharedSolve(solver, World(0, 2), 8, jobs_of(found))
        ranks_of = {}
        for piece in shared._pieces:
            name = piece.linear.job.linear.name
            ranks_of[name] = piece.place.rank
            piece.linear.seconds = {"o": 10.0}.get(name, 1.0)
        alone[turn] = [name for name, rank in ranks_of.items() if list(ranks_of.values()).count(rank) == 1]
        shared._learn()
    assert alone == {0: ["down"], 1: ["o"]}


@pytest.mark.parametrize(("waiting", "expected"), [(1.0, ["down", "q"]), (4.0, [])])
def test_what_waiting_for_one_another_costs_is_learnt(waiting, expected):
    """Linears that took four times as long together as their counts say are solved by one rank each in the next block, and after it."""
    found = linears(torch.float32)
    solver = solver_of(ALPS(), "2:4", found)
    together = {}
    for turn in range(4):
        shared = SharedSolve(solver, World(0, 4), 8, jobs_of(found))
        together[turn] = sorted({piece.linear.job.linear.name for piece in shared._pieces if piece.linear.together})
        for linear in {id(piece.linear): piece.linear for piece in shared._pieces}.values():
            work = linear.work
            linear.seconds = waiting * (4 * work.fixed + work.divided) if linear.together else work.fixed + work.divided
        shared._learn()
    assert together == {0: ["down", "q"], 1: expected, 2: expected, 3: expected}


def test_a_failure_in_rows_that_one_rank_solves_is_raised_on_all(ranks):
    answers = ranks.run(4, "tests.ranks.linears:fail_together", 2)
    assert [answer[:2] for answer in answers] == [("ValueError", "rank 2: down: dual: a bug")] * 4


def test_a_failure_on_the_rank_that_computes_a_factor_is_raised_on_all(ranks):
    answers = ranks.run(2, SHARED, SparseGPT(), "2:4", torch.float32, 1)
    assert [answer[0] for answer in answers] == ["ValueError"] * 2
    assert answers[0][1] == answers[1][1] and answers[0][1].startswith("rank 1: ") and "gram" in answers[0][1]
