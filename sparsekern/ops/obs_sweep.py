"""`obs_sweep`: prune a weight matrix and compensate each removal in the weights not yet visited (SparseGPT), using one factor."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_finite, check_tensor, check_whole, dimensions
from ..pattern import NM, Pattern, parse_pattern, pruned_count
from ._batch import one_by_one
from ._registry import define_op, sample

SCHEMA = (
    '(Tensor weight, Tensor factor, *, int n=0, int m=0, float sparsity=0.0, str scope="block", int block_size=128, '
    "Tensor? mask=None) -> (Tensor new_weight, Tensor new_mask, Tensor row_error)"
)
SCOPES = ("block", "row", "matrix")


def obs_sweep(
    weight: torch.Tensor,
    factor: torch.Tensor,
    pattern: str | float | Pattern | None = None,
    *,
    scope: str = "block",
    block_size: int = 128,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prune the columns from left to right to `pattern`, or to a given `mask`, and compensate in the columns to the right.

    The column errors are `e = (weight - new_weight) @ factor`. The sweep therefore needs neither an inverse nor a running update of the
    weights to the right. When it reaches column `j`, the current value is `weight[:, j] + (e_j without its own term) / factor[j, j]`.

    A batch of weights is swept in one call, each with a factor of its own and as if it were alone. All arguments and results then
    have the same leading dimension. On a CPU each thread sweeps whole matrices.

    Args:
        weight: `[out_features, in_features]` or `[batch, out_features, in_features]` float32, bfloat16 or float16. Computed in
            float32, returned in its dtype.
        factor: `[in_features, in_features]` float32 upper triangular, from `reverse_cholesky`; one for each weight of a batch.
            Features with a negative diagonal entry are dead: their weights are cleared at no cost.
        pattern: `"N:M"`, or a sparsity (share of zeros). Each N:M group is chosen from the current weights when the sweep reaches it.
        scope: for a sparsity, the part in which the exact number of pruned weights is counted. `"block"`: all rows of each block of
            columns, chosen when the sweep reaches the block. `"row"`: the same for each row separately. `"matrix"`: the whole matrix,
            chosen from the initial weights. Of equal scores the lower index is kept. Ignored for N:M.
        block_size: columns of a block (SparseGPT: 128). It does not change the result for N:M.
        mask: bool of the shape of `weight`, True where kept: a fixed mask instead of `pattern`. With an N:M pattern, False where a
            weight is pruned in any case; each group is chosen among the others, and keeps fewer than N where fewer are left.

    Returns:
        `(new_weight, mask, row_error)`: the pruned weights in the dtype of `weight`; bool, True where kept; `[out_features]` float32,
        the squared output error of each row before rounding to a 16-bit dtype. It is `d H d^T` for `d = new_weight - weight` and the
        damped Gram matrix `H = factor factor^T`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, pattern or scope; `mask` with a sparsity, or neither; `in_features` not divisible by M;
            NaN or Inf in `weight` or `factor`.

    Source: Frantar and Alistarh, SparseGPT, 2023, algorithm 1; the left-looking form with a reverse Cholesky factor is ours.
    """
    ndim = dimensions(weight, 2)
    check_tensor("weight", weight, ndim=ndim, dtypes=HALF_OR_FLOAT)
    shape = (*weight.shape[:-2], weight.shape[-1], weight.shape[-1])
    check_tensor("factor", factor, ndim=ndim, dtypes=(torch.float32,), shape=shape, device=weight.device)
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    check_whole("block_size", block_size, 1)
    if mask is not None:
        check_tensor("mask", mask, ndim=ndim, dtypes=(torch.bool,), shape=tuple(weight.shape), device=weight.device)
        if pattern is None:
            return _op(weight, factor, scope=scope, block_size=block_size, mask=mask)
    parsed = None if pattern is None else parse_pattern(pattern)
    if parsed is None or (mask is not None and not isinstance(parsed, NM)):
        raise ValueError("pattern, mask: expected one of them, or an N:M pattern and a mask")
    parsed.check_features(weight.shape[-1])
    if isinstance(parsed, NM):
        return _op(weight, factor, n=parsed.n, m=parsed.m, block_size=block_size, mask=mask)
    return _op(weight, factor, sparsity=parsed.sparsity, scope=scope, block_size=block_size)


def reference(
    weight: torch.Tensor,
    factor: torch.Tensor,
    *,
    n: int = 0,
    m: int = 0,
    sparsity: float = 0.0,
    scope: str = "block",
    block_size: int = 128,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if weight.dim() == 3:
        if not len(weight):
            return _fake(weight, factor)

        def swept(index: int) -> tuple[torch.Tensor, ...]:
            own = None if mask is None else mask[index]
            return reference(
                weight[index], factor[index], n=n, m=m, sparsity=sparsity, scope=scope, block_size=block_size, mask=own
            )

        new_weight, keep, row_error = one_by_one(swept, len(weight))
        return new_weight, keep, row_error
    check_finite("weight", weight)
    check_finite("factor", factor)
    rows, columns = weight.shape
    start = weight.contiguous().to(torch.promote_types(weight.dtype, torch.float32))
    factor = factor.to(start.dtype)
    dead = torch.signbit(factor.diagonal())
    diagonal = torch.where(dead, 1.0, factor.diagonal())
    delta = torch.zeros_like(start)  # weight - new_weight of the finished columns
    keep = torch.ones_like(start, dtype=torch.bool) if mask is None else mask.clone(memory_format=torch.contiguous_format)
    if mask is None and not m and scope == "matrix":
        keep = _keep_best(_score(start, diagonal, dead), rows * columns - pruned_count(rows * columns, sparsity), "matrix")
    row_error = torch.zeros(rows, dtype=start.dtype, device=weight.device)
    step = m or block_size
    for a in range(0, columns, step):
        b = min(a + step, columns)
        error = delta[:, :a] @ factor[:a, a:b]
        if m or (mask is None and scope != "matrix"):
            current = start[:, a:b] + _solve_right(error, factor[a:b, a:b], diagonal[a:b])
            score = _score(current, diagonal[a:b], dead[a:b]).masked_fill(~keep[:, a:b], -1)
            keep[:, a:b] &= _choose(score, a, b, columns, n, m, sparsity, scope)
        for j in range(a, b):
            pending = error[:, j - a] + delta[:, a:j] @ factor[a:j, j]
            now = torch.where(dead[j], torch.zeros_like(pending), start[:, j] + pending / diagonal[j])
            new = torch.where(keep[:, j], now, torch.zeros_like(now))
            delta[:, j] = torch.where(dead[j], torch.zeros_like(new), start[:, j] - new)
            row_error += torch.where(dead[j], torch.zeros_like(new), ((now - new) * diagonal[j]) ** 2)
    new_weight = torch.where(keep & ~dead, start - delta, torch.zeros_like(start))
    return new_weight.to(weight.dtype), keep, row_error.float()


def _solve_right(error: torch.Tensor, block: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """Return `error @ block^-1` for the upper triangular `block` with the given diagonal."""
    block = block.clone()
    block.diagonal().copy_(diagonal)
    return torch.linalg.solve_triangular(block, error, upper=True, left=False)


def _score(weight: torch.Tensor, diagonal: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """Return the error of removing each weight, `|w| V_jj`, whose square has the same order; dead features cost nothing."""
    return torch.where(dead, torch.zeros_like(weight), weight.abs() * diagonal)


def _choose(score, a, b, columns, n, m, sparsity, scope) -> torch.Tensor:
    if m:
        return _keep_best(score, n, "row")
    rows = score.shape[0] if scope == "block" else 1
    # Counting the pruned weights up to each block border makes the total exact whatever the block size.
    pruned = pruned_count(rows * b, sparsity) - pruned_count(rows * a, sparsity)
    return _keep_best(score, rows * (b - a) - pruned, "row" if scope == "row" else "matrix")


def _keep_best(score: torch.Tensor, kept: int, scope: str) -> torch.Tensor:
    flat = score.reshape(1, -1) if scope == "matrix" else score
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True).view_as(score)


def _fake(weight, factor, *, n=0, m=0, sparsity=0.0, scope="block", block_size=128, mask=None):
    torch._check(weight.dim() in (2, 3) and factor.shape == (*weight.shape[:-2], weight.shape[-1], weight.shape[-1]))
    new_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return new_weight, torch.empty_like(new_weight, dtype=torch.bool), weight.new_empty(weight.shape[:-1], dtype=torch.float32)


def _samples(generator: torch.Generator):
    for rows, columns, dtype in ((5, 24, torch.float32), (33, 72, torch.bfloat16), (16, 136, torch.float16)):
        x = torch.randn(2 * columns, columns, generator=generator)
        factor = torch.linalg.cholesky((x.T @ x + torch.eye(columns)).flip(0, 1)).flip(0, 1).contiguous()
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        yield sample(weight, factor, n=2, m=4, block_size=32)
        yield sample(weight.T.contiguous().T, factor, n=1, m=8)
        for scope in SCOPES:
            yield sample(weight, factor, sparsity=0.5, scope=scope, block_size=32)
        yield sample(weight, factor, mask=torch.rand(rows, columns, generator=generator) > 0.4)
        yield sample(weight, factor, n=2, m=4, mask=torch.rand(rows, columns, generator=generator) > 0.4)
        if rows == 5:
            weights, factors = torch.stack((weight, weight.flip(0))), torch.stack((factor, 2 * factor))
            yield sample(weights, factors, n=2, m=4)
            yield sample(weights, factors, sparsity=0.3, block_size=16)
            yield sample(weights, factors, mask=weights > 0)


_op = define_op(
    "obs_sweep", SCHEMA, reference=reference, fake=_fake, samples=_samples, friendly={"pattern": ("n", "m", "sparsity")}
)
