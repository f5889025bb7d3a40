"""`gram_symmetrize_`: mirror the lower triangle that `gram_` accumulates."""

from __future__ import annotations

import torch

from .._checks import check_square
from ._registry import define_op, sample


def gram_symmetrize_(gram: torch.Tensor) -> torch.Tensor:
    """Copy the lower triangle of `gram` onto the upper one, in place.

    Args:
        gram: `[features, features]` float32; its upper triangle is overwritten.

    Returns:
        `gram`, exactly symmetric.

    Raises:
        TypeError: another dtype than float32.
        ValueError: no square matrix.
    """
    check_square("gram", gram)
    _op(gram)
    return gram


def reference(gram: torch.Tensor) -> None:
    lower = torch.tril(gram)
    gram.copy_(lower + torch.tril(gram, -1).T)


def _fake(gram) -> None:
    torch._check(gram.dim() == 2 and gram.shape[0] == gram.shape[1])


def _samples(generator: torch.Generator):
    for features in (1, 24, 67):
        yield sample(torch.randn(features, features, generator=generator))


_op = define_op("gram_symmetrize_", "(Tensor(a!) gram) -> ()", reference=reference, fake=_fake, samples=_samples)
