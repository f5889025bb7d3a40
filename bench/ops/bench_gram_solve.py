from __future__ import annotations

import pytest
import torch

from sparsekern.ops import gram_solve

from ..problems import damped, gram_of, relative_error


def cholesky_solve(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped(gram))).T


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
