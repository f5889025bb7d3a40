from __future__ import annotations

import pytest
import torch

from sparsekern.ops import reverse_cholesky

from ..problems import damped, gram_of


def three_factorisations(gram: torch.Tensor) -> torch.Tensor:
    """The public way to the same information: the upper Cholesky factor of the inverse, which is the inverse of ours."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))
    return torch.linalg.cholesky(inverse, upper=True)


def flipped(gram: torch.Tensor) -> torch.Tensor:
    """The same factor in plain PyTorch: Cholesky of the matrix with rows and columns reversed."""
    return torch.linalg.cholesky(damped(gram).flip(0, 1)).flip(0, 1)


@pytest.mark.parametrize("features", [576, 1536, 4096])
@pytest.mark.parametrize("baseline", [three_factorisations, flipped], ids=lambda function: function.__name__)
def test_reverse_cholesky(measure, generator, features, baseline):
    small = gram_of(generator, 200)
    exact = damped(small.double())
    factor = reverse_cholesky(small).double()
    assert torch.equal(factor, factor.triu())
    assert float((factor @ factor.T - exact).norm() / exact.norm()) < 1e-6

    gram = gram_of(generator, features)
    factor, expected = reverse_cholesky(gram), flipped(gram)
    assert float((factor - expected).norm() / expected.norm()) < 1e-4
    measure(
        lambda: reverse_cholesky(gram),
        against=lambda: baseline(gram),
        baseline=baseline.__name__,
        group=f"reverse_cholesky {features} against {baseline.__name__}",
        flops=features**3 // 3,
        bytes=gram.nbytes // 2,
        rounds=3 if features > 2000 else 9,
    )
