"""`reverse_cholesky`: the one factor that an OBS sweep needs, without any inverse."""

from __future__ import annotations

import torch

from .._warnings import warn
from ._checks import check_finite, check_finite_number, check_square, value_of
from ._registry import define_op, sample

SCHEMA = "(Tensor gram, float damping=0.01) -> (Tensor factor, Tensor damping_used)"
SMALLEST_ESCALATION = 1e-6  # what an escalation starts from where no damping was asked for
ESCALATIONS = 3  # float32 attempts with ten times the damping of the one before
RESOLVED_PIVOT = (
    32  # epsilons: for whoever solves with the factor, a pivot below this share of its diagonal entry is rounding error
)


def reverse_cholesky(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Factor the damped Gram matrix as `V V^T` with `V` upper triangular.

    `gram + damping * mean(diag(gram)) * I = V V^T`. The factor of the inverse Hessian that the textbook algorithm needs three
    factorisations for is `V^-1`, and `obs_sweep` works from `V` itself.

    A dead feature (zero diagonal in `gram`: it was never active) has a row and column of zeros in `V` but for its diagonal entry,
    which is *negative*: `-sqrt(damping * mean(diag))`. `V V^T` still holds, and `obs_sweep` sees which weights have no effect.

    If float32 finds the damped matrix indefinite, the damping is multiplied by ten, at most three times; then float64 is tried at
    the damping asked for. Each departure is reported by a `SparsekernWarning`.

    Args:
        gram: `[features, features]` float32. Only the lower triangle is read.
        damping: share of the mean diagonal that is added to the diagonal, at least 0.

    Returns:
        `V`, `[features, features]` float32, zero below the diagonal.

    Raises:
        TypeError, ValueError: wrong dtype or shape, negative or infinite damping, NaN or Inf in `gram` (damping cannot help there: an input
            of the layer was not finite), or a matrix that is indefinite in float64 too.

    Source: the reversed-order Cholesky factor; equal to the inverse of the `chol(H^-1)` of Frantar and Alistarh, SparseGPT, 2023.
    """
    check_square("gram", gram)
    check_finite_number("damping", damping, 0)
    factor, damping_used = _op(gram, damping)
    report_departure(damping, damping_used)
    return factor


def report_departure(damping: float, damping_used: torch.Tensor) -> None:
    """Warn if a factorisation took another damping than it was asked for, or float64."""
    used = value_of(damping_used)
    if used is None:
        return
    if used < 0:
        warn(f"gram: not positive definite in float32 with damping {damping:g}; factored in float64", stacklevel=2)
    elif used != damping:
        warn(f"gram: not positive definite with damping {damping:g}; used {used:g} instead", stacklevel=2)


def reference(gram: torch.Tensor, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor and the damping that was used (float64, 0-dim); a negative value says float64 arithmetic was needed."""
    return factorise(gram, damping, 0.0)


def factorise(gram: torch.Tensor, damping: float, smallest_pivot: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `reference` returns; a pivot below `smallest_pivot` epsilons of its damped diagonal entry counts as not positive."""
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
    """The dampings that float32 tries, in order."""
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
    """The factor with a one where dead features have their mark, for solving with it, and which features are dead."""
    dead = torch.signbit(factor.diagonal())
    factor = factor.clone()
    factor.diagonal()[dead] = 1.0
    return factor, dead


def _fake(gram, damping=0.01):
    torch._check(gram.dim() == 2 and gram.shape[0] == gram.shape[1])
    return torch.empty_like(gram, memory_format=torch.contiguous_format), gram.new_empty((), dtype=torch.float64)


def _samples(generator: torch.Generator):
    for features in (1, 24, 67):
        x = torch.randn(2 * features, features, generator=generator)
        x[:, features // 3] = 0
        yield sample(x.T @ x + torch.eye(features) * 1e-3)
        yield sample(x.T @ x, 0.05)


_op = define_op("reverse_cholesky", SCHEMA, reference=reference, fake=_fake, samples=_samples)
