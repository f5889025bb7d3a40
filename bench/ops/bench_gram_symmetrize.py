from __future__ import annotations

import pytest
import torch

from sparsekern.ops import gram_symmetrize_


def add_transposed(gram: torch.Tensor) -> None:
    gram.copy_(gram.tril() + gram.tril(-1).T)


IMPLEMENTATIONS = {"sparsekern": gram_symmetrize_, "tril + tril.T": add_transposed}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gram_symmetrize(measure, generator, name):
    gram = torch.randn(4096, 4096, generator=generator)
    expected = gram.tril() + gram.tril(-1).T
    symmetrize = IMPLEMENTATIONS[name]
    symmetrize(gram)
    assert torch.equal(gram, expected)
    measure(lambda: symmetrize(gram), group="gram_symmetrize_ 4096", bytes=gram.nbytes // 2, rounds=5)
