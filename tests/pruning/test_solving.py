"""What the solver of a run does around a method: it shares out time, and says each kind of notice once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsekern import ALPS, Magnitude, SparseGPT, SparsekernWarning
from sparsekern.models import find_linears
from sparsekern.pattern import NM, Unstructured
from sparsekern.pruning.blockwise import solving
from sparsekern.pruning.blockwise.sharing import solve_shared
from sparsekern.pruning.blockwise.solving import Job, Solved, Solver, stacks_of
from sparsekern.pruning.progress import Clock, Notices
from sparsekern.ranks import World
from tests.ranks.linears import SHAPES, jobs_of, linears, solve_alone, solver_of


def test_linears_that_are_solved_together_share_the_time(monkeypatch):
    linears = find_linears(nn.ModuleDict({name: nn.Linear(8, 2 if name == "d" else 4) for name in "abcd"}))
    plan = SimpleNamespace(patterns={linear.name: NM(2, 4) for linear in linears})
    clock = Clock(torch.device("cpu"))
    readings = iter([0.0, 6.0, 10.0, 11.0])  # around the three of one shape, then around the last
    monkeypatch.setattr(clock, "now", lambda: next(readings))
    result = Solved()
    Solver(Magnitude(), plan, 0, clock).solve_many([Job(linear) for linear in linears], result)
    assert {name: layer.seconds for name, layer in result.layers.items()} == {"a": 2.0, "b": 2.0, "c": 2.0, "d": 1.0}


def test_a_notice_is_given_once_for_its_kind():
    notices = Notices()
    with pytest.warns(SparsekernWarning) as said:
        for name in "ab":
            notices.once("kind", f"{name} is odd")
            notices.once("other kind", f"{name} is even")
    assert [str(warning.message) for warning in said] == ["a is odd (shown once)", "a is even (shown once)"]


@pytest.fixture
def stacking(monkeypatch):
    """Linears on this CPU are stacked as those on a GPU."""
    monkeypatch.setattr(solving, "waits_for_launches", lambda weight: True)


def names_of(stacks: list[list[Job]]) -> list[list[str]]:
    return [[job.linear.name for job in stack] for stack in stacks]


@pytest.mark.parametrize(
    ("method", "pattern", "dtype"),
    [
        (SparseGPT(), "2:4", torch.float32),
        (SparseGPT(), "1:8", torch.bfloat16),
        (SparseGPT(keep_zeros=False), "2:4", torch.bfloat16),
        (SparseGPT(scope="row"), "0.5", torch.float32),  # around zeros: rows with and without are swept apart
        (SparseGPT(mask="wanda"), "0.3", torch.float16),
    ],
    ids=str,
)
def test_a_stack_has_the_bits_of_its_linears(stacking, monkeypatch, method, pattern, dtype):
    expected = solve_alone(method, pattern, dtype)
    found, result, solved = linears(dtype), Solved(), []
    solve = SparseGPT.solve
    monkeypatch.setattr(SparseGPT, "solve", lambda own, weight, *args: solved.append(len(weight)) or solve(own, weight, *args))
    solve_shared(solver_of(method, pattern, found), World(), 1, jobs_of(found), result)
    assert sorted(solved) == [64, 150, 270]  # q and k at once
    for name, weight in expected.weights.items():
        assert torch.equal(result.weights[name], weight)
        assert result.weights[name].untyped_storage().nbytes() == weight.untyped_storage().nbytes()
        assert result.layers[name].zeros == expected.layers[name].zeros
        assert result.layers[name].error == pytest.approx(expected.layers[name].error, rel=1e-6)
    seconds = {name: result.layers[name].seconds / SHAPES[name][0] for name in "qk"}
    assert seconds["q"] == pytest.approx(seconds["k"])  # by rows


@pytest.mark.parametrize(
    ("method", "pattern"),
    [(SparseGPT(), Unstructured(0.5)), (SparseGPT(scope="matrix"), Unstructured(0.5)), (ALPS(), NM(2, 4))],
    ids=str,
)
def test_linears_whose_rows_share_a_count_are_not_stacked(stacking, method, pattern):
    found = linears(torch.float32)
    assert names_of(stacks_of(solver_of(method, str(pattern), found), jobs_of(found))) == [["q"], ["k"], ["o"], ["down"]]


def test_what_a_stack_may_hold(stacking, monkeypatch):
    found = linears(torch.float32)
    solver, jobs = solver_of(SparseGPT(), "2:4", found), jobs_of(found)
    assert names_of(stacks_of(solver, jobs)) == [["q", "k"], ["o"], ["down"]]
    solver.plan.patterns["k"] = NM(1, 4)
    assert names_of(stacks_of(solver, jobs)) == [["q"], ["k"], ["o"], ["down"]]
    solver.plan.patterns["k"] = NM(2, 4)
    weights = 32 * (SHAPES["q"][0] + SHAPES["k"][0])
    for most, together in ((weights, [["q", "k"]]), (weights - 1, [["q"], ["k"]])):
        monkeypatch.setattr(solving, "MOST_STACKED", most)
        assert names_of(stacks_of(solver, jobs[:2])) == together


def test_on_a_cpu_nothing_is_stacked():
    found = linears(torch.float32)
    assert [len(stack) for stack in stacks_of(solver_of(SparseGPT(), "2:4", found), jobs_of(found))] == [1, 1, 1, 1]


def test_an_error_names_the_linear_of_a_stack(stacking):
    found = linears(torch.float32)
    found[1].weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"^k: weight: .*3, 4"):
        solve_shared(solver_of(SparseGPT(), "2:4", found), World(), 1, jobs_of(found), Solved())
