from __future__ import annotations

import torch

from sparsekern.ops import gram_inverse

from ..inputs import assert_close, damped, gram_of
from ..problem import Case, Place, Problem

LIBRARY = "torch.cholesky_inverse"


def inverse(place: Place, features: int) -> Problem:
    small, gram = gram_of(place, 200), gram_of(place, features)

    def library() -> torch.Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))

    def check(result: torch.Tensor) -> None:
        assert_close(gram_inverse(small), torch.linalg.inv(damped(small.double())), 1e-5)
        assert_close(result, library(), 1e-3)

    return Problem(
        calls=[lambda: gram_inverse(gram)],
        check=check,
        baselines={LIBRARY: [library]},
        flops=features**3,
        read=gram.nbytes // 2,
        written=gram.nbytes,
        captured=False,
    )


CASES = [
    Case(
        f"gram_inverse {features}",
        inverse,
        {"features": features},
        {"features": 96},
        op="gram_inverse",
        cpu={LIBRARY: None},
        cuda={LIBRARY: None} if features == 4096 else None,
        rounds=3 if features > 2000 else 9,
    )
    for features in (576, 1536, 4096)
]


def test_gram_inverse(timed, case):
    timed(case)
