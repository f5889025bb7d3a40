from __future__ import annotations

import pytest
import torch

from baselines.plain import plain_admm_step_
from sparsekern.ops import admm_step_

CASES = [(4096, 4096, 0.5, "matrix"), (4096, 4096, 0.5, "row"), (4096, 4096, "2:4", "matrix"), (1536, 576, 0.5, "matrix")]


@pytest.mark.parametrize(("rows", "columns", "pattern", "scope"), CASES)
def test_step(measure, generator, rows, columns, pattern, scope):
    """Both sides take their step from a fresh copy of the state, whose making is timed with it: a second step would start from zeros."""
    offset, dual, weight = (torch.randn(rows, columns, generator=generator) for _ in range(3))
    mask = torch.rand(rows, columns, generator=generator) < 0.5

    def run(step) -> list[torch.Tensor]:
        state = [offset.clone(), dual.clone(), mask.clone()]
        step(*state, weight, pattern, scope=scope)
        return state

    ours, theirs = run(admm_step_), run(plain_admm_step_)
    same = ours[2] == theirs[2]
    assert int((~same).sum()) <= rows  # `kthvalue` drops all that equal the threshold
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got[same], want[same])
    measure(
        lambda: run(admm_step_),
        against=lambda: run(plain_admm_step_),
        baseline="plain torch",
        goal=1.5,
        group=f"admm_step_ {rows}x{columns} {pattern} {scope}",
        bytes=26 * weight.numel(),
    )
