from __future__ import annotations

import torch
from torch.nn import functional as F

from baselines.plain import gradient_steps
from sparsekern.ops import gated_split
from sparsekern.ops.gated_split import reference

from ..problem import Case, Place, Problem

SAME, STEPS = "the same in PyTorch", "two gradient steps"


def objective(p: torch.Tensor, up: torch.Tensor, gate: torch.Tensor, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return ((p - F.silu(s) * z).square() + (z - up).square() + (s - gate).square()).sum()


def gated(place: Place, tokens: int, features: int) -> Problem:
    up, gate, *noise = (place.randn(tokens, features) for _ in range(5))
    given = F.silu(gate) * up + 0.3 * noise[0], up + 0.3 * noise[1], gate + 0.3 * noise[2], gate

    def check(found: tuple[torch.Tensor, torch.Tensor]) -> None:
        ours, before = objective(*given[:3], *found), objective(*given[:3], up, gate)
        theirs = objective(*given[:3], *gradient_steps(*given))
        assert ours < before, f"objective {float(ours):.6g}, before the split {float(before):.6g}"
        assert ours <= theirs, f"objective {float(ours):.6g}, two gradient steps reach {float(theirs):.6g}"

    return Problem(
        calls=[lambda: gated_split(*given, "silu")],
        check=check,
        baselines={SAME: [lambda: reference(*given, "silu")], STEPS: [lambda: gradient_steps(*given)]},
        read=4 * up.nbytes,
        written=2 * up.nbytes,
    )


def case(tokens: int, features: int, **where) -> Case:
    sizes, toy = {"tokens": tokens, "features": features}, {"tokens": 32, "features": 48}
    return Case(f"gated_split [{tokens}, {features}]", gated, sizes, toy, op="gated_split", rounds=3, **where)


CASES = [case(1024, 4096, cpu={SAME: None, STEPS: None}), case(8192, 11008, cuda={STEPS: None})]


def test_gated_split(timed, case):
    timed(case)
