from __future__ import annotations

import pytest
import torch

from sparsekern.ops import gram_symmetrize_


@pytest.mark.parametrize("features", [0, 1, 2, 31, 32, 33, 100])
def test_the_lower_triangle_is_mirrored_to_the_bit(threads, generator, features):
    threads(3)
    gram = torch.randn(features, features, generator=generator)
    lower = gram.tril()
    gram[torch.ones_like(gram, dtype=torch.bool).triu(1)] = torch.nan
    assert gram_symmetrize_(gram) is gram
    assert torch.equal(gram, gram.T) and torch.equal(gram.tril(), lower)


def test_strided(generator):
    storage = torch.randn(20, 20, generator=generator)
    gram = storage[::2, ::2]
    expected = gram.tril() + gram.tril(-1).T
    between = storage[1::2].clone()
    assert torch.equal(gram_symmetrize_(gram), expected)
    assert torch.equal(storage[1::2], between)


def test_arguments_are_refused():
    with pytest.raises(ValueError, match=r"gram: expected a square matrix, got shape \(2, 3\)"):
        gram_symmetrize_(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="gram: expected dtype float32, got float64"):
        gram_symmetrize_(torch.zeros(2, 2).double())
