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
