from __future__ import annotations

import pytest
import torch

from sparsekern.ops import gram_inverse

from ..problems import damped, gram_of, relative_error


def cholesky_inverse(gram: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))


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
