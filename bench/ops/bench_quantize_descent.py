from __future__ import annotations

import torch

from sparsekern.layouts.nm_q4 import nearest_multiple
from sparsekern.ops import quantize_descent_
from sparsekern.ops.quantize_descent import reference

from ..inputs import damped
from ..problem import Case, Place, Problem
from .bench_obs_quantize import COLUMN_BY_COLUMN, inputs


def descend(place: Place, size: int) -> Problem:
    target, gram, mask, scales = inputs(place, size)
    hessian = damped(gram)
    start = nearest_multiple(target, scales.float().repeat_interleave(64, 1)) * mask
    residual = (start - target) @ hessian

    def run(step) -> torch.Tensor:
        weight, own = start.clone(), residual.clone()
        step(weight, own, hessian, mask, scales, 1)
        return weight

    def check(result: torch.Tensor) -> None:
        """A pass lowers the error of every row."""
        errors = [((weight - target) @ hessian * (weight - target)).sum(1) for weight in (start, result)]
        assert (errors[1] < errors[0]).all()

    return Problem(
        calls=[lambda: run(quantize_descent_)],
        check=check,
        baselines={COLUMN_BY_COLUMN: [lambda: run(reference)]},
        read=3 * target.nbytes + mask.nbytes,
        written=2 * target.nbytes,
        captured=False,
    )


CASES = [
    Case(
        "quantize_descent_, one pass, 2048x2048",
        descend,
        {"size": 2048},
        {"size": 128},
        op="quantize_descent_",
        cpu={COLUMN_BY_COLUMN: 3.0},
        rounds=1,
    )
]


def test_quantize_descent(timed, case):
    timed(case)
