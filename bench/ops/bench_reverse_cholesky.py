from __future__ import annotations

import torch

from sparsekern.ops import reverse_cholesky

from ..inputs import DAMPING, assert_close, damped, gram_of
from ..problem import Case, Place, Problem

THREE, FLIPPED = "Cholesky, inverse, Cholesky", "Cholesky of the flipped matrix"


def factor(place: Place, features: int) -> Problem:
    small, gram = gram_of(place, 200), gram_of(place, features)

    def three_factorisations() -> torch.Tensor:
        """The public way to the same information: the upper Cholesky factor of the inverse, which is the inverse of ours."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))
        return torch.linalg.cholesky(inverse, upper=True)

    def flipped() -> torch.Tensor:
        """The same factor: Cholesky of the matrix with rows and columns reversed."""
        return torch.linalg.cholesky(damped(gram).flip(0, 1)).flip(0, 1)

    def check(result: torch.Tensor) -> None:
        for given, found, most in ((small, reverse_cholesky(small, DAMPING), 1e-6), (gram, result, 1e-5)):
            assert torch.equal(found, found.triu()), "not upper triangular"
            assert_close(found.double() @ found.double().T, damped(given.double()), most)

    return Problem(
        calls=[lambda: reverse_cholesky(gram, DAMPING)],
        check=check,
        baselines={THREE: [three_factorisations], FLIPPED: [flipped]},
        flops=features**3 // 3,
        read=gram.nbytes // 2,
        written=gram.nbytes,
        captured=False,
    )


def case(features: int, likely_seconds: float = 5, **where) -> Case:
    return Case(
        f"reverse_cholesky {features}",
        factor,
        {"features": features},
        {"features": 256},
        op="reverse_cholesky",
        rounds=3 if features > 2000 else 9,
        likely_seconds=likely_seconds,
        **where,
    )


CASES = [
    case(4096, cpu={THREE: None, FLIPPED: None}, cuda={THREE: None}),
    case(11008, likely_seconds=8, cuda={THREE: None}),
    case(1536, cpu={THREE: None, FLIPPED: None}),
    case(576, cpu={THREE: None, FLIPPED: None}),
]


def test_reverse_cholesky(timed, case):
    timed(case)
