from __future__ import annotations

import torch

from sparsekern.ops import feature_norm_

from ..inputs import TOKENS_AT_ONCE, activations, short
from ..problem import Case, Place, Problem

PUBLIC, SQUARES, LIBRARY = "the norm of the public Wanda, squared", "square, sum", "vector_norm in float32"


def feature_norm(place: Place, tokens: int, features: int, dtype: torch.dtype) -> Problem:
    x = activations(place, tokens, features, dtype)
    sums = torch.zeros(features, device=place.device)

    def check(_) -> None:
        exact = sum(part.double().square().sum(0) for part in x.split(TOKENS_AT_ONCE))
        fresh = feature_norm_(torch.zeros_like(sums), x)
        torch.testing.assert_close(fresh.double(), exact, rtol=1e-5, atol=0)

    return Problem(
        calls=[lambda: feature_norm_(sums, x)],
        check=check,
        baselines={
            PUBLIC: [lambda: sums.add_(torch.norm(x.T.float(), p=2, dim=1) ** 2)],
            SQUARES: [lambda: sums.add_(x.float().square().sum(0))],
            LIBRARY: [lambda: torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)],
        },
        flops=2 * x.numel(),
        read=x.nbytes,
    )


def case(tokens: int, dtype: torch.dtype, **where) -> Case:
    sizes = {"tokens": tokens, "features": 4096, "dtype": dtype}
    toy = {"tokens": 512, "features": 128}
    return Case(f"feature_norm_ [{tokens}, 4096] {short(dtype)}", feature_norm, sizes, toy, op="feature_norm_", rounds=3, **where)


CASES = [
    *(case(16384, dtype, cpu={PUBLIC: None, SQUARES: None}) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    case(262144, torch.bfloat16, cuda={LIBRARY: None}),
]


def test_feature_norm(timed, case):
    timed(case)
