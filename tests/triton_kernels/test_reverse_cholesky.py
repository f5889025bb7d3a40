"""Sizes that do not fill a tile, strides, and what is left to the reference."""

from __future__ import annotations

import pytest
import torch

from sparsekern.backends import LeftToReference, implementations
from sparsekern.ops.reverse_cholesky import reference
from sparsekern.triton_kernels.reverse_cholesky import TILE, attempt


def gram_of(features: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(2 * features + 4, features, generator=generator)
    x[:, features // 3] = 0.0
    return x.T @ x


@pytest.mark.parametrize("features", [2, TILE - 1, TILE, TILE + 1, 2 * TILE + 5, 3 * TILE, 300])
def test_every_size_is_the_reference(features, generator, poisoned):
    gram = gram_of(features, generator)
    expected, _ = reference(gram, 0.01)
    found = attempt(gram, 0.01)
    assert int(found.failed) == int(found.not_finite) == 0
    torch.testing.assert_close(found.factor, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not found.factor.tril(-1).any() and float(found.factor[features // 3, features // 3]) < 0


def test_only_the_lower_triangle_is_read_in_rows_of_any_pitch(generator):
    gram = gram_of(70, generator)
    wide = torch.full((70, 96), float("nan"))
    wide[:, :70] = gram.tril() + torch.full_like(gram, float("nan")).triu(1)
    found = attempt(wide[:, :70], 0.01)
    assert int(found.not_finite) == 0
    torch.testing.assert_close(found.factor, attempt(gram, 0.01).factor, rtol=0, atol=0)


@pytest.mark.parametrize("place", [(0, 0), (69, 0), (69, 69), (68, 67)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(generator, place, value):
    gram = gram_of(70, generator)
    gram[place] = value
    assert int(attempt(gram, 0.01).not_finite) == 1


def test_an_indefinite_matrix_is_left_to_the_reference():
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    (triton,) = implementations("reverse_cholesky")
    with pytest.raises(LeftToReference, match="indefinite"):
        triton.run(gram, 0.01)
