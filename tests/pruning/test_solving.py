"""What the solver of a run does around a method: it shares out time, and says each kind of notice once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsekern import Magnitude, SparsekernWarning
from sparsekern.models import find_linears
from sparsekern.pattern import NM
from sparsekern.pruning.blockwise.solving import Job, Solved, Solver
from sparsekern.pruning.progress import Clock, Notices


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
