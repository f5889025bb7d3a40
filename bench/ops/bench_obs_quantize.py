from __future__ import annotations

import torch

from sparsekern.ops import obs_quantize, reverse_cholesky
from sparsekern.ops.obs_quantize import reference

from ..inputs import gram_of
from ..problem import Case, Place, Problem

COLUMN_BY_COLUMN = "column by column"


def inputs(place: Place, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight, a Gram matrix, a mask and scales."""
    weight = place.randn(size, size)
    scales = torch.full((size, size // 64), 0.3, dtype=torch.float16, device=place.device)
    return weight, gram_of(place, size), place.rand(size, size) > 0.5, scales


def quantize(place: Place, size: int) -> Problem:
    weight, gram, mask, scales = inputs(place, size)
    factor = reverse_cholesky(gram, 0.01)

    def check(result: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Some rows are near those of float64, where a few weights may be rounded to another multiple, and have their errors."""
        found, errors = (own[:16].double() for own in result)
        exact, _ = reference(weight[:16].double(), factor.double(), mask[:16], scales[:16])
        assert float((found == exact).double().mean()) > 0.99
        actual = ((found - weight[:16].double()) @ factor.double()).square().sum(1)
        torch.testing.assert_close(errors, actual, rtol=1e-3, atol=0)

    return Problem(
        calls=[lambda: obs_quantize(weight, factor, mask, scales)],
        check=check,
        baselines={COLUMN_BY_COLUMN: [lambda: reference(weight, factor, mask, scales)]},
        flops=float(size) ** 3,
        read=2 * weight.nbytes + mask.nbytes,
        written=weight.nbytes,
        captured=False,
    )


CASES = [
    Case(
        "obs_quantize, 4096x4096",
        quantize,
        {"size": 4096},
        {"size": 128},
        op="obs_quantize",
        cpu={COLUMN_BY_COLUMN: 3.0},
        rounds=1,
    )
]


def test_obs_quantize(timed, case):
    timed(case)
