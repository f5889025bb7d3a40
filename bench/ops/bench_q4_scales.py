from __future__ import annotations

import torch

from sparsekern.ops import q4_scales
from sparsekern.ops.q4_scales import reference

from ..problem import Case, Place, Problem


def search(place: Place, size: int) -> Problem:
    weight, importance = place.randn(size, size), place.rand(size)

    def check(result: torch.Tensor) -> None:
        """Nearly all scales are those of float64, where equal costs may be told apart."""
        exact = reference(weight[:16].double(), importance.double())
        assert float((result[:16] == exact).double().mean()) > 0.99

    return Problem(
        calls=[lambda: q4_scales(weight, importance)],
        check=check,
        baselines={"in PyTorch": [lambda: reference(weight, importance)]},
        flops=24 * 5 * float(size) ** 2,
        read=weight.nbytes + importance.nbytes,
        written=weight.nbytes // 128,
        captured=False,
    )


CASES = [Case("q4_scales, 2048x2048", search, {"size": 2048}, {"size": 128}, op="q4_scales", cpu={"in PyTorch": 3.0}, rounds=3)]


def test_q4_scales(timed, case):
    timed(case)
