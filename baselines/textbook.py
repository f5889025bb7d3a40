"""The published pruning algorithms in plain PyTorch, as their public programs run them.

They keep the public semantics where those differ from ours. `n_zeros` of every `m` weights are *zeroed*. A sparsity prunes every score
up to and including the one at index `floor(count * sparsity)` of the sorted scores: one more than asked for, and any ties.
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
    """Prune by SparseGPT: three factorisations, then a loop over columns.

    Source: Frantar and Alistarh, 2023.

    Args:
        weight: `[rows, columns]`.
        hessian: `[columns, columns]`, any positive multiple of `X^T X`. The computation runs in its dtype.
        sparsity: Share of zeros in each block of columns; unused with `m`.
        n_zeros: Weights to zero in every `m` consecutive ones of a row.
        m: Group size; 0 prunes to `sparsity`.
        blocksize: Columns a block.
        percdamp: Damping as a share of the mean of the diagonal.

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
    """Run SparseGPT's loop over columns alone.

    `upper` is the upper Cholesky factor of the inverse Hessian; the computation runs in its dtype.
    """
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
    """Prune by Wanda: a full stable sort of each row, or a loop over the groups.

    A row loses exactly `floor(columns * sparsity)` weights. Source: Sun et al., 2023.

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
    """Prune by magnitude: one threshold for the whole matrix, or the smallest weights of each group.

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
    """Prune by ALPS: ADMM with the eigenvectors of `gram` in float64, then conjugate gradients.

    Everything is transposed (`[columns, rows]`), and nothing that the public program computes is left out. That includes the inverse from
    the eigenvectors for every penalty, a full sort of all scores, and the trace of the error by a product of all rows with all rows.
    Conjugate gradients compute three products an iteration, and their stopping test never passes. Source: Meng et al., 2024.

    Args:
        weight: `[rows, columns]`.
        gram: `[columns, columns]`, `X^T X`. The computation runs in its dtype.
        sparsity: Share of zeros in the matrix; unused with `m`.
        n_kept: Weights to *keep* in every `m` consecutive ones of a row.
        m: Group size; 0 prunes to `sparsity`.
        damping: Added to the diagonal, as a share of its mean.
        rho: The first penalty.
        iterations: The most iterations of ADMM.

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
