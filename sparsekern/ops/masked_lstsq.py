"""`masked_lstsq`: the weights on a fixed mask whose outputs are closest to those of the dense weights."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_finite, check_finite_number, check_square, check_tensor, check_whole, value_of
from .._warnings import warn
from ._registry import define_op, sample

SCHEMA = (
    "(Tensor weight, Tensor gram, Tensor mask, *, Tensor? start=None, float damping=0.0, float tolerance=1e-4, "
    'int max_iterations=100, str solver="auto") -> (Tensor new_weight, Tensor row_error, Tensor unfinished)'
)
SOLVERS = ("auto", "cholesky", "cg")
# A row is factored up to this support, and up to this multiple of columns^2 for its cube: the time of about eight iterations.
LARGEST_EXACT, EXACT_SHARE = 256, 12
SMALLEST_PIVOT = 32  # epsilons; a smaller pivot means a rank-deficient support, which is left to conjugate gradients
EXACT_FIT = 1e-6  # share of the initial error that is rounding


def masked_lstsq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    damping: float = 0.0,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    solver: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights with the smallest output error among those that are zero outside `mask`.

    The output error is `d H d^T` with `d = new_weight - weight` and `H = gram + damping * mean(diag(gram)) * I`. All rows are solved at
    once by conjugate gradients with Jacobi preconditioning, one product with `H` per iteration. Rows with a small support are solved
    exactly, by a Cholesky factorisation each. Features that were never active (a zero on the diagonal of `gram`) get zero weights. If `H`
    does not determine the weights, the result is the solution that conjugate gradients reach from `start`.

    On a GPU an iteration is one kernel and one product with the error of float32, even if torch allows TF32. With `solver="cholesky"`
    torch's operators factor the rows one after the other.

    Args:
        weight: `[out_features, in_features]` float32, bfloat16 or float16: the dense weights. Computed in float32.
        gram: `[in_features, in_features]` float32. Only the lower triangle is read.
        mask: `[out_features, in_features]` bool, True where kept.
        start: initial weights, shape and dtype of `weight`; entries outside the mask are ignored. None starts from `weight`.
        damping: share of the mean diagonal added to the diagonal, at least 0; it draws the result towards `weight`.
        tolerance: a row is finished when two iterations lower its error by less than this share.
        max_iterations: maximum iterations of a row. Rows that are not finished then are reported by a `SparsekernWarning`.
        solver: `"cholesky"` or `"cg"` for all rows; `"auto"` for the faster one by the size of a row's support (on a GPU, `"cg"`). Rows
            with a rank-deficient support are always solved by `"cg"`.

    Returns:
        `(new_weight, row_error)`: `[out_features, in_features]` in the dtype of `weight`; `[out_features]` float32, `d H d^T` of each
        row before rounding to a 16-bit dtype.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device; a negative damping or tolerance, no iterations, an unknown solver; NaN or Inf in `weight`,
            `gram` or `start`.

    Source: the post-processing of Meng et al., ALPS, 2024, algorithm 2. The stopping test is the decrease of the error over two steps,
    after Hestenes and Stiefel, 1952.
    """
    check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
    check_square("gram", gram)
    check_tensor("gram", gram, ndim=2, dtypes=(torch.float32,), shape=(weight.shape[1],) * 2, device=weight.device)
    check_tensor("mask", mask, ndim=2, dtypes=(torch.bool,), shape=tuple(weight.shape), device=weight.device)
    if start is not None:
        check_tensor("start", start, ndim=2, dtypes=(weight.dtype,), shape=tuple(weight.shape), device=weight.device)
    check_finite_number("damping", damping, 0)
    check_finite_number("tolerance", tolerance, 0)
    check_whole("max_iterations", max_iterations, 1)
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    new_weight, row_error, unfinished = _op(
        weight, gram, mask, start=start, damping=damping, tolerance=tolerance, max_iterations=max_iterations, solver=solver
    )
    if left := value_of(unfinished):
        warn(
            f"masked_lstsq: {left} of {len(weight)} rows are not within tolerance {tolerance:g} after {max_iterations} iterations",
        )
    return new_weight, row_error


def reference(
    weight: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    damping: float = 0.0,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    solver: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lower = torch.tril(gram)
    check_finite("weight", weight)
    check_finite("gram", lower)
    if start is not None:
        check_finite("start", start)
    unit, to = _unit_gram(lower, damping)
    mask = mask & (to > 0)
    target = weight.to(unit.dtype) * to
    solution = (weight if start is None else start).to(unit.dtype) * to * mask
    residual = (target - solution) @ unit
    error = ((target - solution) * residual).sum(1)
    residual = residual * mask
    active = residual.abs().amax(1) > 0 if residual.numel() else residual.new_zeros(len(residual), dtype=torch.bool)
    if solver != "cg":
        rows = active if solver == "cholesky" else active & _small(mask)
        step, solved = _solve_exactly(unit, residual, mask, rows)
        solution = solution + step
        error = error - (step * residual).sum(1)
        active = active & ~solved
    solution, error, active = _conjugate_gradients(unit, solution, residual, mask, error, active, tolerance, max_iterations)
    new_weight = torch.where(to > 0, solution / to, 0).to(weight.dtype)
    return new_weight, error.clamp(min=0).float(), active.sum()


def _unit_gram(lower: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the damped Gram matrix with a unit diagonal, and the factor that takes weights to its basis; 0 for dead features."""
    diagonal = lower.diagonal().double()
    shift = damping * diagonal.mean() if len(diagonal) else 0.0
    dead = diagonal <= 0
    to = (diagonal + shift).sqrt().masked_fill(dead, 0).to(lower.dtype)
    scale = (diagonal + shift).rsqrt().masked_fill(dead, 0).to(lower.dtype)
    below = torch.tril(lower, -1) * scale[:, None] * scale
    return below + below.T + torch.diag((~dead).to(lower.dtype)), to


def _small(mask: torch.Tensor) -> torch.Tensor:
    support = mask.sum(1)
    if mask.is_cuda:  # factorisations launch kernels for each row; an iteration is one product for all rows, which is faster
        return torch.zeros_like(support, dtype=torch.bool)
    return (support <= LARGEST_EXACT) & (support**3 <= EXACT_SHARE * mask.shape[1] ** 2)


def _solve_exactly(
    unit: torch.Tensor, residual: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the step to the solution of the given rows, zero for all others, and the rows that could be factored."""
    step, solved = torch.zeros_like(residual), torch.zeros_like(rows)
    for row in rows.nonzero().flatten().tolist():
        support = mask[row]
        factor, info = torch.linalg.cholesky_ex(unit[support][:, support])
        if int(info) == 0 and (factor.diagonal().square() >= SMALLEST_PIVOT * torch.finfo(unit.dtype).eps).all():
            step[row, support] = torch.cholesky_solve(residual[row, support][:, None], factor)[:, 0]
            solved[row] = True
    return step, solved


def _conjugate_gradients(unit, solution, residual, mask, error, active, tolerance, max_iterations):
    """Iterate on the active rows; return the solution, the errors, and the rows that are still active."""
    direction, gamma = residual, residual.square().sum(1)
    floor, last = EXACT_FIT * error, torch.full_like(error, torch.finfo(error.dtype).max)
    for _ in range(max_iterations):
        if not active.any():
            break
        product = direction @ unit
        curvature = (direction * product).sum(1)
        alpha = torch.where(active & (curvature > 0), gamma / curvature, 0)
        solution = solution + alpha[:, None] * direction
        residual = residual - alpha[:, None] * (product * mask)
        decrease = alpha * gamma
        error = error - decrease
        next_gamma = residual.square().sum(1)
        active = active & (next_gamma > 0) & (decrease + last > tolerance * torch.maximum(error, floor))
        last = decrease
        direction = residual + torch.where(gamma > 0, next_gamma / gamma, 0)[:, None] * direction
        gamma = next_gamma
    return solution, error, active


def _fake(weight, gram, mask, *, start=None, damping=0.0, tolerance=1e-4, max_iterations=100, solver="auto"):
    torch._check(weight.dim() == 2 and gram.dim() == 2 and gram.shape[0] == gram.shape[1] == weight.shape[1])
    new_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return new_weight, weight.new_empty(weight.shape[0], dtype=torch.float32), weight.new_empty((), dtype=torch.int64)


def _samples(generator: torch.Generator):
    for rows, columns, dtype in ((5, 24, torch.float32), (50, 71, torch.bfloat16), (17, 136, torch.float16)):
        x = torch.randn(4 * columns, columns, generator=generator)
        x[:, columns // 3] = 0
        gram = x.T @ x
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        mask = torch.rand(rows, columns, generator=generator) < torch.linspace(0, 1, rows)[:, None]
        exact = {"tolerance": 1e-9}
        yield sample(weight, gram, mask, **exact)
        yield sample(weight, gram, mask, solver="cholesky", damping=0.1, **exact)
        yield sample(weight, gram, mask, solver="cg", start=torch.zeros_like(weight), **exact)


_op = define_op("masked_lstsq", SCHEMA, reference=reference, fake=_fake, samples=_samples)
