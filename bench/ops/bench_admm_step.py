from __future__ import annotations

import torch

from baselines.plain import plain_admm_step_
from sparsekern.ops import admm_step_

from ..problem import Case, Place, Problem

PLAIN = "plain torch"


def step(place: Place, rows: int, columns: int, pattern: str | float, scope: str) -> Problem:
    """Both sides step from a fresh copy of the state, whose making is timed with it: a second step would start from zeros."""
    offset, dual, weight = (place.randn(rows, columns) for _ in range(3))
    mask = place.rand(rows, columns) < 0.5

    def run(step_) -> list[torch.Tensor]:
        state = [offset.clone(), dual.clone(), mask.clone()]
        step_(*state, weight, pattern, scope=scope)
        return state

    def check(state: list[torch.Tensor]) -> None:
        expected = run(plain_admm_step_)
        agree = state[2] == expected[2]
        assert int((~agree).sum()) <= rows, "another mask"  # `kthvalue` drops every entry that equals the threshold
        assert all(torch.equal(got[agree], want[agree]) for got, want in zip(state, expected, strict=True)), "another step"

    return Problem(
        calls=[lambda: run(admm_step_)],
        check=check,
        baselines={PLAIN: [lambda: run(plain_admm_step_)]},
        read=13 * weight.numel(),
        written=13 * weight.numel(),
        captured=False,
    )


CASES = [
    Case(
        f"admm_step_ {rows}x{columns} {pattern} {scope}",
        step,
        {"rows": rows, "columns": columns, "pattern": pattern, "scope": scope},
        {"rows": 64, "columns": 128},
        op="admm_step_",
        cpu={PLAIN: 1.5},
        cuda={PLAIN: None} if rows == 4096 else None,
    )
    for rows, columns, pattern, scope in [
        (4096, 4096, 0.5, "matrix"),
        (4096, 4096, 0.5, "row"),
        (4096, 4096, "2:4", "matrix"),
        (1536, 576, 0.5, "matrix"),
    ]
]


def test_admm_step(timed, case):
    timed(case)
