from __future__ import annotations

import pytest
import torch

from sparsekern.ops import gram_inverse, gram_solve

from ..problems import damped, gram_of


def cholesky_solve(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped(gram))).T


def cholesky_inverse(gram: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize(("rows", "features"), [(192, 576), (1536, 576), (576, 1536), (4096, 4096)])
def test_gram_solve(measure, generator, rows, features):
    small, small_cross = gram_of(generator, 200), torch.randn(50, 200, generator=generator)
    exact = torch.linalg.solve(damped(small.double()), small_cross.double(), left=False)
    assert relative_error(gram_solve(small, small_cross), exact) < 1e-5

    gram, cross = gram_of(generator, features), torch.randn(rows, features, generator=generator)
    assert relative_error(gram_solve(gram, cross), cholesky_solve(gram, cross)) < 1e-3
    measure(
        lambda: gram_solve(gram, cross),
        against=lambda: cholesky_solve(gram, cross),
        baseline="torch.cholesky_solve",
        group=f"gram_solve {rows}x{features}",
        flops=features**3 // 3 + 2 * rows * features**2,
        bytes=gram.nbytes // 2 + 2 * cross.nbytes,
        rounds=3 if features > 2000 else 9,
    )


@pytest.mark.parametrize("features", [576, 1536, 4096])
def test_gram_inverse(measure, generator, features):
    small = gram_of(generator, 200)
    assert relative_error(gram_inverse(small), torch.linalg.inv(damped(small.double()))) < 1e-5

    gram = gram_of(generator, features)
    assert relative_error(gram_inverse(gram), cholesky_inverse(gram)) < 1e-3
    measure(
        lambda: gram_inverse(gram),
        against=lambda: cholesky_inverse(gram),
        baseline="torch.cholesky_inverse",
        group=f"gram_inverse {features}",
        flops=features**3,
        bytes=gram.nbytes // 2 + gram.nbytes,
        rounds=3 if features > 2000 else 9,
    )
