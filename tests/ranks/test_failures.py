"""A failure of one rank while others work or wait: all of them end, and nothing hangs, which the watchdog of the pool would show."""

from __future__ import annotations

import pytest

CASES = "tests.ranks.cases"


@pytest.mark.parametrize("looks", [True, False], ids=["at a look", "anywhere"])
@pytest.mark.parametrize("victim", [0, 2])
def test_ranks_that_work_are_stopped(ranks, victim, looks):
    answers = ranks.run(3, f"{CASES}:busy", victim, ValueError("a bug"), looks)
    assert answers == [["ValueError", f"rank {victim}: a bug"]] * 3


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_interrupt_or_exit_of_one_rank_ends_all(ranks, error):
    name = type(error).__name__
    first, second = ranks.run(2, f"{CASES}:busy", 1, error, True)
    assert first[0] == "RuntimeError" and first[1].startswith(f"rank 1: {name}")
    assert second == [name, str(error)]
    assert ranks.run(2, f"{CASES}:failing", {}) == [None] * 2  # the group can still be used


@pytest.mark.parametrize("victim", [0, 1])
def test_an_interrupt_in_the_middle_of_an_exchange_ends_all_for_good(ranks, victim):
    answers = ranks.run(4, f"{CASES}:interrupted", victim, 3)
    ranks.renew()
    for rank, (found, again) in enumerate(answers):
        if rank == victim:
            assert found == ["KeyboardInterrupt", ""]
            continue
        for kind, message in (found, again):
            assert kind == "ConnectionError"
            assert f"rank {victim} was interrupted: KeyboardInterrupt; blocks that are finished are kept in out" in message
