"""`gram_solve`: ridge least squares from a Gram matrix and a cross-Gram matrix, by one Cholesky factorisation."""

from __future__ import annotations

import torch

from .._checks import check_finite, check_finite_number, check_square, check_tensor
from ._registry import define_op, sample
from .reverse_cholesky import RESOLVED_PIVOT, alive, factorise, report_departure

SCHEMA = "(Tensor gram, Tensor cross, float damping=0.01) -> (Tensor solution, Tensor damping_used)"


def gram_solve(gram: torch.Tensor, cross: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Return the weights `W` that minimise `||x W^T - y||`, from `gram = x^T x` and `cross = y^T x`.

    Solves `W (gram + shift I) = cross` with `shift = damping * mean(diag(gram))`. The inputs `x` themselves are not needed. Weights of
    features that were never active (a zero on the diagonal of `gram`) are zero.

    If the tokens do not determine the weights (rank deficiency), the damping does. If it is zero, or so small that a pivot is rounding
    error, it is multiplied by ten, at most three times; then float64 is tried, as in `reverse_cholesky`. Each change is reported by a
    `SparsekernWarning`. On a GPU this is a composition of torch's operators: the factorisation and the two triangular solves of the CUDA
    libraries are all the work.

    Args:
        gram: `[features, features]` float32. Only the lower triangle is read.
        cross: `[out_features, features]` float32, any strides.
        damping: share of the mean diagonal added to the diagonal, at least 0.

    Returns:
        `W`, `[out_features, features]` float32.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device, a negative or infinite damping, NaN or Inf in `gram` or `cross`, or a matrix that is
            indefinite even in float64.
    """
    check_square("gram", gram)
    check_tensor("cross", cross, ndim=2, dtypes=(torch.float32,), shape=(None, gram.shape[0]), device=gram.device)
    check_finite_number("damping", damping, 0)
    solution, damping_used = _op(gram, cross, damping)
    report_departure(damping, damping_used)
    return solution


def reference(gram: torch.Tensor, cross: torch.Tensor, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the solution and the damping used, in the convention of `reverse_cholesky.reference`."""
    check_finite("cross", cross)
    factor, damping_used = factorise(gram, damping, RESOLVED_PIVOT)
    factor, dead = alive(factor)
    half_solved = torch.linalg.solve_triangular(factor.T, cross.masked_fill(dead, 0), upper=False, left=False)
    return torch.linalg.solve_triangular(factor, half_solved, upper=True, left=False).contiguous(), damping_used


def _fake(gram, cross, damping=0.01):
    torch._check(gram.dim() == 2 and cross.dim() == 2 and gram.shape[0] == gram.shape[1] == cross.shape[1])
    return torch.empty_like(cross, memory_format=torch.contiguous_format), gram.new_empty((), dtype=torch.float64)


def _samples(generator: torch.Generator):
    for outputs, features in ((1, 1), (5, 24), (40, 137)):
        x = torch.randn(2 * features + 3, features, generator=generator)
        y = torch.randn(len(x), outputs, generator=generator)
        yield sample(x.T @ x + torch.eye(features) * 1e-2, y.T @ x)
        x[:, features // 3] = 0
        yield sample(x.T @ x, (x.T @ y).T, 0.1)


_op = define_op("gram_solve", SCHEMA, reference=reference, fake=_fake, samples=_samples)
