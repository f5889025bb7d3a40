"""Exchanges between ranks, failures of one of them, and sums whose bits do not depend on the number of ranks."""

from __future__ import annotations

import errno

import pytest
import torch

from sparsekern.ranks import TreeSum, World, deal, leaf_sizes
from sparsekern.ranks.sums import bytes_of_sum

from .cases import leaf_of

CASES = "tests.ranks.cases"


def plain_tree(leaves: list[torch.Tensor]) -> torch.Tensor:
    while len(leaves) > 1:
        leaves = [leaves[i] + leaves[i + 1] for i in range(0, len(leaves), 2)]
    return leaves[0]


def test_the_order_of_the_sum_shows():
    leaves = [leaf_of(leaf, (37,)) for leaf in range(8)]
    assert not torch.equal(plain_tree(leaves), sum(leaves))


@pytest.mark.parametrize(("shape", "lower"), [((1,), False), ((37,), False), ((5, 7), False), ((70, 70), True)])
def test_a_sum_has_the_same_bits_for_every_number_of_ranks(ranks, shape, lower):
    expected = plain_tree([leaf_of(leaf, shape) for leaf in range(8)])
    expected = expected.tril() if lower else expected
    for size in (2, 4):
        for found, _ in ranks.run(size, f"{CASES}:summed", shape, 8, lower):
            assert torch.equal(found, expected)


def test_a_sum_sends_what_the_formula_says(ranks):
    features = 640
    for size in (2, 4):
        for _, sent in ranks.run(size, f"{CASES}:summed", (features, features), 8, True):
            formula = bytes_of_sum(size, features * (features + 1) // 2)
            assert formula <= sent <= 1.1 * formula


def test_leaves_are_added_in_pairs_with_few_parts_kept():
    kept = []
    tree: TreeSum = TreeSum(lambda a, b: f"({a}+{b})")
    for leaf in "01234567":
        tree.put(leaf)
        kept.append(len(tree._parts))
    assert tree.result() == "(((0+1)+(2+3))+((4+5)+(6+7)))"
    assert max(kept) == 3


def test_values_of_all_ranks_are_gathered_and_tensors_broadcast(ranks):
    values = [{"rank": 0}, {"rank": 1}]
    assert ranks.run(2, f"{CASES}:gathered") == [(values, "zero", [1.0] * 3)] * 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("up_proj: its input is nan"), ("ValueError", "rank 3: up_proj: its input is nan")),
        (KeyError("x"), ("KeyError", "\"rank 3: 'x'\"")),
        (OSError(errno.ENOSPC, "no space left", "out/x"), ("OSError", "[Errno 28] rank 3: no space left: 'out/x'")),
        (FileExistsError("out: there is one"), ("FileExistsError", "rank 3: out: there is one")),
        (AssertionError("own"), ("RuntimeError", "rank 3: AssertionError: own")),
    ],
)
def test_a_failure_of_one_rank_is_the_same_exception_on_all(ranks, error, expected):
    for _ in range(2):  # the group can still be used
        assert [answer[:2] for answer in ranks.run(4, f"{CASES}:failing", {3: error})] == [expected] * 4


def test_the_lowest_rank_that_failed_is_named(ranks):
    answers = ranks.run(4, f"{CASES}:failing", {1: ValueError("one"), 2: TypeError("two")})
    assert [answer[:2] for answer in answers] == [("ValueError", "rank 1: one")] * 4


def test_no_rank_is_named_where_all_fail_alike(ranks):
    answers = ranks.run(2, f"{CASES}:failing", {rank: TypeError("seed: expected a number") for rank in range(2)})
    assert [answer[:2] for answer in answers] == [("TypeError", "seed: expected a number")] * 2


def test_ranks_at_different_places_are_refused(ranks):
    message = "ranks: expected all at one place, got rank 0 at 'there', rank 1 at 'here'"
    assert [answer[:2] for answer in ranks.run(2, f"{CASES}:out_of_step")] == [("RuntimeError", message)] * 2


def test_values_that_differ_are_named(ranks):
    values = [{"seed": 0, "pattern": "2:4"}] * 2 + [{"seed": 1, "pattern": "2:4"}] + [{"seed": 0, "pattern": "1:4"}]
    message = "seed: expected the same on all ranks, got another on rank 2 than on rank 0 (seed 1 and 0)"
    assert [answer[:2] for answer in ranks.run(4, f"{CASES}:unlike", values)] == [("ValueError", message)] * 4
    values[1] = {"seed": 2, "pattern": "2:4", "calibration": 64 * "0"}  # a digest is not shown
    message = "calibration, seed: expected the same on all ranks, got another on rank 1 than on rank 0 (seed 2 and 0)"
    assert [answer[:2] for answer in ranks.run(4, f"{CASES}:unlike", values)] == [("ValueError", message)] * 4
    assert ranks.run(4, f"{CASES}:unlike", values[:1] * 4) == [None] * 4


def test_one_process_is_a_world_of_its_own():
    world = World.current()
    assert (world.rank, world.size, world.leads, world.gather("here", 5)) == (0, 1, True, [5])
    with pytest.raises(ValueError, match="^plain$"), world.together():
        raise ValueError("plain")


def test_batches_are_dealt_evenly_and_in_order():
    assert leaf_sizes(2, 8) == [0, 0, 0, 1, 0, 0, 0, 1]
    for count in range(30):
        sizes = leaf_sizes(count, 8)
        assert sum(sizes) == count
        for own in (8, 4, 2, 1):  # the leaves of a rank
            dealt = [sum(sizes[begin : begin + own]) for begin in range(0, 8, own)]
            assert max(dealt) - min(dealt) <= 1


def test_the_longest_work_goes_first_to_the_least_busy():
    assert deal([4, 4, 4, 10], 2) == [[3], [0, 1, 2]]
    assert deal([1], 3) == [[0], [], []]
