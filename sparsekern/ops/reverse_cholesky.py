"""`reverse_cholesky`: the only factor that an OBS sweep needs, without an inverse."""

from __future__ import annotations

import torch

from .._checks import check_finite, check_finite_number, check_square, dimensions, values_of
from .._warnings import warn
from ._batch import one_by_one
from ._registry import define_op, sample

SCHEMA = "(Tensor gram, float damping=0.01) -> (Tensor factor, Tensor damping_used)"
SMALLEST_ESCALATION = 1e-6  # smallest damping of an escalation, if none was requested
ESCALATIONS = 3  # float32 attempts, each with ten times the previous damping
RESOLVED_PIVOT = 32  # epsilons; a pivot below this share of its diagonal entry is rounding error to a solver


def reverse_cholesky(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Factor the damped Gram matrix as `V V^T` with `V` upper triangular.

    `gram + damping * mean(diag(gram)) * I = V V^T`. The textbook algorithm takes three factorisations to get the factor of the inverse
    Hessian, which is `V^-1`. `obs_sweep` uses `V` itself.

    A dead feature (a zero on the diagonal of `gram`: it was never active) has a row and column of zeros in `V`, except for its diagonal
    entry, which is *negative*: `-sqrt(damping * mean(diag))`. `V V^T` is still correct, and `obs_sweep` sees which weights have no effect.

    If the damped matrix is indefinite in float32, the damping is multiplied by ten, at most three times; then float64 is tried with the
    requested damping. Each change is reported by a `SparsekernWarning`.

    A batch of Gram matrices is factored in one call, each as if it were alone. On a CPU each thread factors whole matrices.

    Args:
        gram: `[features, features]` or `[batch, features, features]` float32. Only the lower triangle is read.
        damping: share of the mean diagonal added to the diagonal, at least 0.

    Returns:
        `V`, float32 of the shape of `gram`, zero below the diagonal.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape; a negative or infinite damping; NaN or Inf in `gram`, which no damping can repair, because an input
            of the layer was not finite; a matrix that is indefinite even in float64.

    Source: the reversed-order Cholesky factor, equal to the inverse of the `chol(H^-1)` of Frantar and Alistarh, SparseGPT, 2023.
    """
    factor, damping_used = factor_quietly(gram, damping)
    report_departure(damping, damping_used)
    return factor


def factor_quietly(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor and the damping used, as `reference` does, without a warning; `report_departure` gives it."""
    check_square("gram", gram, ndim=dimensions(gram, 2))
    check_finite_number("damping", damping, 0)
    return _op(gram, damping)


def report_departure(damping: float, damping_used: torch.Tensor) -> None:
    """Warn of each factorisation that used another damping than requested, or float64."""
    values = values_of(damping_used)
    if values is None:
        return
    for index, used in enumerate(values):
        name = f"gram[{index}]" if damping_used.dim() else "gram"
        if used < 0:
            warn(f"{name}: not positive definite in float32 with damping {damping:g}; factored in float64", stacklevel=2)
        elif used != damping:
            warn(f"{name}: not positive definite with damping {damping:g}; used {used:g} instead", stacklevel=2)


def reference(gram: torch.Tensor, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor and the damping used, float64 and one number a matrix; a negative one says that float64 was needed."""
    if gram.dim() == 2:
        return factorise(gram, damping, 0.0)
    if not len(gram):
        return _fake(gram, damping)
    factor, damping_used = one_by_one(lambda index: factorise(gram[index], damping, 0.0), len(gram))
    return factor, damping_used


def factorise(gram: torch.Tensor, damping: float, smallest_pivot: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of `reference`; pivots below `smallest_pivot` epsilons of their damped diagonal entry are not positive."""
    lower = torch.tril(gram)
    check_finite("gram", lower)
    for attempt in damping_schedule(damping):
        factor = _attempt(lower, attempt, smallest_pivot)
        if factor is not None:
            return factor, torch.tensor(attempt, dtype=torch.float64, device=gram.device)
    factor = _attempt(lower.double(), damping, smallest_pivot)
    if factor is None:
        raise ValueError(indefinite_message(damping))
    used = -damping if damping > 0 else -float("inf")
    return factor.float(), torch.tensor(used, dtype=torch.float64, device=gram.device)


def damping_schedule(damping: float) -> list[float]:
    """Return the dampings that are tried in float32, in order."""
    start = max(damping, SMALLEST_ESCALATION / 10)
    return [damping] + [start * 10**step for step in range(1, ESCALATIONS + 1)]


def indefinite_message(damping: float) -> str:
    return f"gram: not positive semi-definite (damping {damping:g} and up to {10**ESCALATIONS} times that were tried, then float64)"


def _attempt(lower: torch.Tensor, damping: float, smallest_pivot: float) -> torch.Tensor | None:
    diagonal = lower.diagonal()
    dead = diagonal == 0
    shift = damping * diagonal.double().mean() if len(diagonal) else diagonal.double().sum()
    damped = lower + torch.tril(lower, -1).T
    damped.diagonal().add_(shift.to(lower.dtype))
    damped.diagonal()[dead] = 1.0
    flipped, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if info.any():
        return None
    factor = flipped.flip(0, 1).contiguous()
    smallest_share = smallest_pivot * torch.finfo(lower.dtype).eps
    if (factor.diagonal().square() < smallest_share * damped.diagonal())[~dead].any():
        return None
    factor.diagonal()[dead] = -shift.sqrt().to(lower.dtype)
    return factor


def alive(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor with a one in place of the mark of dead features, to solve with it, and the mask of dead features."""
    dead = torch.signbit(factor.diagonal())
    factor = factor.clone()
    factor.diagonal()[dead] = 1.0
    return factor, dead


def _fake(gram, damping=0.01):
    torch._check(gram.dim() in (2, 3) and gram.shape[-1] == gram.shape[-2])
    return torch.empty_like(gram, memory_format=torch.contiguous_format), gram.new_empty(gram.shape[:-2], dtype=torch.float64)


def _samples(generator: torch.Generator):
    for features in (1, 24, 67):
        x = torch.randn(2 * features, features, generator=generator)
        x[:, features // 3] = 0
        yield sample(x.T @ x + torch.eye(features) * 1e-3)
        yield sample(x.T @ x, 0.05)
    yield sample(torch.stack((x.T @ x, torch.eye(features), torch.zeros(features, features))), 0.02)


_op = define_op("reverse_cholesky", SCHEMA, reference=reference, fake=_fake, samples=_samples)
