"""`gram_inverse`: the inverse of a damped Gram matrix, for repeated products with it."""

from __future__ import annotations

import torch

from .._checks import check_finite_number, check_square
from ..backends.products import add_product
from ._registry import define_op, sample
from .reverse_cholesky import RESOLVED_PIVOT, alive, factorise, report_departure

PANEL = 1024  # columns of a panel; more would waste more on zeros, fewer make products too small for their overhead
SCHEMA = "(Tensor gram, float damping=0.01) -> (Tensor inverse, Tensor damping_used)"


def gram_inverse(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Return the symmetric inverse of `gram + damping * mean(diag(gram)) * I`, by one Cholesky factorisation.

    To solve only once, `gram_solve` is faster and more accurate. Rows and columns of features that were never active (a zero on the
    diagonal of `gram`) are zero. Rank deficiency is handled as in `gram_solve`.

    Args:
        gram: `[features, features]` float32. Only the lower triangle is read.
        damping: share of the mean diagonal added to the diagonal, at least 0.

    Returns:
        `[features, features]` float32, exactly symmetric.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, a negative or infinite damping, NaN or Inf in `gram`, or a matrix that is indefinite even in float64.
    """
    check_square("gram", gram)
    check_finite_number("damping", damping, 0)
    inverse, damping_used = _op(gram, damping)
    report_departure(damping, damping_used)
    return inverse


def reference(gram: torch.Tensor, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inverse and the damping used, in the convention of `reverse_cholesky.reference`."""
    factor, damping_used = factorise(gram, damping, RESOLVED_PIVOT)
    factor, dead = alive(factor)
    inverse = _gram_of_upper(_inverse_of_upper(factor, torch.where(dead, 0.0, torch.ones_like(factor.diagonal()))))
    return torch.tril(inverse) + torch.tril(inverse, -1).T, damping_used


def _inverse_of_upper(factor: torch.Tensor, ones: torch.Tensor) -> torch.Tensor:
    """Return the inverse of an upper triangle times the diagonal `ones`, by halves: all but the blocks of `PANEL` is in products."""
    features = len(factor)
    if features <= PANEL:
        return torch.linalg.solve_triangular(factor, torch.diag_embed(ones), upper=True)
    middle = -(-features // (2 * PANEL)) * PANEL
    inverse, product = torch.zeros_like(factor), torch.empty_like(factor[:middle, middle:])
    inverse[:middle, :middle] = _inverse_of_upper(factor[:middle, :middle], ones[:middle])
    inverse[middle:, middle:] = _inverse_of_upper(factor[middle:, middle:], ones[middle:])
    add_product(product, factor[:middle, middle:], inverse[middle:, middle:], begins=True)
    add_product(inverse[:middle, middle:], inverse[:middle, :middle], product.neg_(), begins=True)
    return inverse


def _gram_of_upper(root: torch.Tensor) -> torch.Tensor:
    """Return `root^T root` of an upper triangle, its lower triangle: without the zeros, a third to a sixth of the arithmetic."""
    gram = torch.empty_like(root)
    for begin in range(0, len(root), PANEL):
        end = min(begin + PANEL, len(root))
        add_product(gram[begin:, begin:end], root[:end, begin:].T, root[:end, begin:end], begins=True)
    return gram


def _fake(gram, damping=0.01):
    torch._check(gram.dim() == 2 and gram.shape[0] == gram.shape[1])
    return torch.empty_like(gram, memory_format=torch.contiguous_format), gram.new_empty((), dtype=torch.float64)


def _samples(generator: torch.Generator):
    for features in (1, 24, 137):
        x = torch.randn(2 * features + 3, features, generator=generator)
        yield sample(x.T @ x + torch.eye(features) * 1e-2)
        x[:, features // 3] = 0
        yield sample(x.T @ x, 0.1)


_op = define_op("gram_inverse", SCHEMA, reference=reference, fake=_fake, samples=_samples)
