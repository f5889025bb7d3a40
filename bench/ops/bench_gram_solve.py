from __future__ import annotations

import torch

from sparsekern.ops import gram_solve

from ..inputs import assert_close, damped, gram_of
from ..problem import Case, Place, Problem

LIBRARY = "torch.cholesky_solve"


def solve(place: Place, rows: int, features: int) -> Problem:
    small, small_cross = gram_of(place, 200), place.randn(50, 200)
    gram, cross = gram_of(place, features), place.randn(rows, features)

    def library() -> torch.Tensor:
        return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped(gram))).T

    def check(result: torch.Tensor) -> None:
        exact = torch.linalg.solve(damped(small.double()), small_cross.double(), left=False)
        assert_close(gram_solve(small, small_cross), exact, 1e-5)
        assert_close(result, library(), 1e-3)

    return Problem(
        calls=[lambda: gram_solve(gram, cross)],
        check=check,
        baselines={LIBRARY: [library]},
        flops=features**3 // 3 + 2 * rows * features**2,
        read=gram.nbytes // 2 + cross.nbytes,
        written=cross.nbytes,
        captured=False,
    )


CASES = [
    Case(
        f"gram_solve {rows}x{features}",
        solve,
        {"rows": rows, "features": features},
        {"rows": 64, "features": 96},
        op="gram_solve",
        cpu={LIBRARY: None},
        cuda={LIBRARY: None} if features == 4096 else None,
        rounds=3 if features > 2000 else 9,
    )
    for rows, features in ((192, 576), (1536, 576), (576, 1536), (4096, 4096))
]


def test_gram_solve(timed, case):
    timed(case)
