"""The published algorithms in plain PyTorch, as their public programs run them: what the methods are checked against, and what the
benchmarks are measured against.

Public semantics are kept where they differ from ours: `n_zeros` of every `m` weights are *zeroed*, and a sparsity prunes every score
up to and including the one at index `floor(count * sparsity)` of the sorted scores, which is one more than asked for (and any ties).
"""

from __future__ import annotations

import math

import torch


def textbook_sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: float = 0.0,
    n_zeros: int = 0,
    m: int = 0,
    blocksize: int = 128,
    percdamp: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frantar and Alistarh, 2023: three factorisations, then a loop over columns.

    Args:
        weight: `[rows, columns]`; hessian: `[columns, columns]`, any positive multiple of `X^T X`. The dtype of `hessian` is that of
            the computation.

    Returns:
        The pruned weights and the mask, True where kept.
    """
    work, hessian = weight.to(hessian.dtype).clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    work[:, dead] = 0
    hessian.diagonal().add_(percdamp * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    new_weight, mask = textbook_sweep(work, upper, sparsity, n_zeros, m, blocksize)
    return new_weight.to(weight.dtype), mask


def textbook_sweep(
    weight: torch.Tensor, upper: torch.Tensor, sparsity: float = 0.0, n_zeros: int = 0, m: int = 0, blocksize: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop over columns alone, from `upper`, the upper Cholesky factor of the inverse Hessian, in its dtype."""
    work = weight.to(upper.dtype, copy=True)
    columns = work.shape[1]
    pruned = torch.zeros_like(work, dtype=torch.bool)
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        block, triangle = work[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(block)
        block_pruned = torch.zeros_like(block, dtype=torch.bool)
        if not m:
            score = (block / triangle.diagonal()) ** 2
            threshold = score.flatten().sort().values[int(score.numel() * sparsity)]
            block_pruned = score <= threshold
        for j in range(stop - start):
            if m and j % m == 0:
                score = (block[:, j : j + m] / triangle.diagonal()[j : j + m]) ** 2
                block_pruned.scatter_(1, j + score.topk(n_zeros, dim=1, largest=False).indices, True)
            column = block[:, j]
            kept = column.masked_fill(block_pruned[:, j], 0)
            errors[:, j] = (column - kept) / triangle[j, j]
            block[:, j:] -= errors[:, j, None] * triangle[None, j, j:]
            block[:, j] = kept
        work[:, start:stop] = block
        work[:, stop:] -= errors @ upper[start:stop, stop:]
        pruned[:, start:stop] = block_pruned
    return work, ~pruned


def textbook_wanda(
    weight: torch.Tensor, sum_squares: torch.Tensor, sparsity: float = 0.0, n_zeros: int = 0, m: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sun et al., 2023: a full stable sort of each row, or a loop over the groups. Prunes exactly `floor(columns * sparsity)` a row.

    Returns:
        The pruned weights and the mask, True where kept.
    """
    score = weight.abs().to(sum_squares.dtype) * sum_squares.sqrt()
    pruned = torch.zeros_like(score, dtype=torch.bool)
    if m:
        for j in range(0, score.shape[1], m):
            pruned.scatter_(1, j + score[:, j : j + m].topk(n_zeros, dim=1, largest=False).indices, True)
    else:
        order = score.sort(dim=1, stable=True).indices
        pruned.scatter_(1, order[:, : math.floor(score.shape[1] * sparsity)], True)
    return weight.masked_fill(pruned, 0), ~pruned


def textbook_magnitude(
    weight: torch.Tensor, sparsity: float = 0.0, n_zeros: int = 0, m: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """One threshold for the whole matrix, or the smallest of each group.

    Returns:
        The pruned weights and the mask, True where kept.
    """
    if m:
        return textbook_wanda(weight, torch.ones(weight.shape[1], dtype=weight.dtype), n_zeros=n_zeros, m=m)
    threshold = weight.abs().flatten().sort().values[int(weight.numel() * sparsity)]
    pruned = weight.abs() <= threshold
    return weight.masked_fill(pruned, 0), ~pruned


def textbook_alps(
    weight: torch.Tensor,
    gram: torch.Tensor,
    sparsity: float = 0.0,
    n_kept: int = 0,
    m: int = 0,
    damping: float = 0.01,
    rho: float = 0.1,
    iterations: int = 300,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Meng et al., 2024, as its public program runs: ADMM with the eigenvectors of `gram` in float64, then conjugate gradients.

    Everything is transposed (`[columns, rows]`), and nothing is left out that the program computes: the inverse from the eigenvectors for
    every penalty, a full sort of all scores, the trace of the error by a product of all rows with all rows, and three products an
    iteration of conjugate gradients, whose stopping test never passes. `n_kept` of every `m` weights are *kept*.

    Args:
        weight: `[rows, columns]`; gram: `[columns, columns]`, `X^T X`, whose dtype is that of the computation.

    Returns:
        The pruned weights and the mask, True where kept.
    """
    gram = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    scale = gram.diagonal().sqrt() + 1e-8
    gram = gram / scale / scale[:, None]
    dense = (weight.to(gram.dtype) * scale).T
    right = gram @ dense
    total = dense.numel()
    kept = total * n_kept // m if m else round((1 - sparsity) * total)
    values, vectors = torch.linalg.eigh(gram.double())

    def inverse(rho: float) -> torch.Tensor:
        return ((vectors / (values + rho)) @ vectors.T).to(gram.dtype)

    def project(z: torch.Tensor) -> torch.Tensor:
        if m:
            groups = z.T.reshape(-1, m)
            dropped = groups.square().topk(m - n_kept, dim=1, largest=False).indices
            return groups.scatter(1, dropped, 0).view_as(z.T).T
        dropped = (-z.square()).flatten().topk(total - kept).indices
        return z.flatten().scatter(0, dropped, 0).view_as(z)

    solution, dual, sparse = dense, torch.zeros_like(dense), project(dense)
    support, started, step = sparse == 0, False, inverse(rho)
    for iteration in range(iterations):
        solution = step @ (right - dual + rho * sparse)
        sparse = project(solution + dual / rho)
        dual = dual + rho * (solution - sparse)
        if (iteration + 1) % 3:
            continue
        changed = int(((sparse == 0) != support).sum())
        support = sparse == 0
        ((sparse - dense).T @ (gram @ sparse - right)).diagonal().sum()  # the trace that nothing reads
        if changed > 0.1 * kept:
            started, rho = True, rho * 1.3
        elif changed > 0.005 * kept:
            started, rho = True, rho * 1.2
        elif changed and started:
            rho *= 1.1
        elif changed:
            rho, solution, dual, sparse = rho / 5, dense, torch.zeros_like(dense), project(dense)
        elif started:
            break
        else:
            rho /= 5
        step = inverse(min(rho, 1e6))
        if iteration >= 30 and changed < 3e-4 * kept:
            break
    solution = project(solution)
    mask = solution != 0
    residual = (right - gram @ solution) * mask
    direction, power = residual, residual.square().sum(0)
    for _ in range(10):
        curvature = (direction * (gram @ direction)).sum(0)
        alpha = power / curvature.where(curvature != 0, 1e-8)
        solution = solution + alpha * direction
        residual = residual - alpha * (gram @ direction) * mask
        (gram @ solution - right).norm(dim=1).max()  # the stopping test: unmasked, over the wrong axis
        next_power = residual.square().sum(0)
        direction = residual + next_power / power.where(power != 0, 1e-8) * direction
        power = next_power
    return (solution.T / scale).to(weight.dtype), mask.T.contiguous()
