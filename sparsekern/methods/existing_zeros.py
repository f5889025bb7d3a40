"""SparseGPT's sweep where the op does not choose the mask.

Zeros that a weight has already stay zero, and count as pruned before any other weight. Rows that other processes sweep take part in the
choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import ops
from .._checks import check_finite
from ..backends.products import full_float32
from ..pattern import NM, Pattern, Unstructured, pruned_count
from .selection import keep_mask_of_team
from .solution import Team

COLUMNS = 128  # of N:M groups that share one product with all columns before them


def sweep_keeping_zeros(
    weight: torch.Tensor, factor: torch.Tensor, pattern: Pattern, *, scope: str, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `ops.obs_sweep` returns as new weight and row error, but every zero of `weight` is zero in the new weight.

    An N:M group with more zeros than the pattern prunes keeps them all. A sparsity is reached by the non-zeros in excess of it, which
    are taken from all blocks of columns in proportion to their non-zeros. A weight with more zeros than the sparsity is unchanged.

    On a CPU the op chooses N:M groups among the non-zeros. Otherwise rows without zeros are swept by the op where rows do not share a
    count, and so is a weight without zeros.

    Args:
        weight: as for `ops.obs_sweep`.
        factor: as for `ops.obs_sweep`.
        pattern: as for `ops.obs_sweep`.
        scope: as for `ops.obs_sweep`.
        block_size: as for `ops.obs_sweep`.

    Raises:
        ValueError: NaN or Inf in `weight` or `factor`.
    """
    options: dict[str, Any] = {"scope": scope, "block_size": block_size}
    if isinstance(pattern, NM) and not weight.is_cuda:
        return ops.obs_sweep(weight, factor, pattern, mask=weight != 0, **options)[::2]
    zero = weight == 0
    affected = zero.any(1)
    if not affected.any():
        return ops.obs_sweep(weight, factor, pattern, **options)[::2]
    check_finite("weight", weight)
    check_finite("factor", factor)
    if scope == "matrix" and not isinstance(pattern, NM):
        (kept,) = _kept_counts(zero, pattern, scope, weight.shape[1])
        return ops.obs_sweep(weight, factor, mask=_best(_score(weight.float(), factor), zero, kept))[::2]
    if scope == "block" and not isinstance(pattern, NM):
        return _sweep(weight, zero, factor, pattern, scope, block_size)
    new_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    row_error = weight.new_empty(len(weight), dtype=torch.float32)
    new_weight[affected], row_error[affected] = _sweep(weight[affected], zero[affected], factor, pattern, scope, block_size)
    if not affected.all():
        new_weight[~affected], row_error[~affected] = ops.obs_sweep(weight[~affected], factor, pattern, **options)[::2]
    return new_weight, row_error


def best_of_matrix(weight: torch.Tensor, factor: torch.Tensor, sparsity: float, zero: torch.Tensor) -> torch.Tensor:
    """Return the mask of a sweep that chooses from the initial weights of the whole matrix, True where a weight is kept.

    Args:
        weight: as for `ops.obs_sweep`.
        factor: as for `ops.obs_sweep`.
        sparsity: the share of zeros.
        zero: bool of the shape of `weight`, True at weights that stay zero, which are pruned first.
    """
    check_finite("weight", weight)
    check_finite("factor", factor)
    (kept,) = _kept_of_blocks(zero, sparsity, weight.shape[1])
    return keep_mask_of_team(_score(weight.float(), factor), kept, Team(), never=zero)


@full_float32()
def sweep_tiles(
    weight: torch.Tensor,
    tiles: Sequence[slice],
    factor: torch.Tensor,
    sparsity: float,
    block_size: int,
    zero: torch.Tensor,
    team: Team,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return some rows of the new weight, and their errors, where all rows of each block of columns share a count.

    Args:
        weight: the whole weight.
        tiles: the rows, see `LinearMethod.solve_tiles`.
        factor: as for `ops.obs_sweep`.
        sparsity: the share of zeros.
        block_size: columns of a block.
        zero: bool of the shape of `weight`, True at weights that stay zero.
        team: the processes that sweep the other rows.
    """
    check_finite("weight", weight)
    check_finite("factor", factor)
    columns, rows = weight.shape[1], slice(tiles[0].start, tiles[-1].stop) if tiles else slice(0, 0)
    tiles = [slice(tile.start - rows.start, tile.stop - rows.start) for tile in tiles]
    counts = iter(_kept_of_blocks(zero, sparsity, block_size))
    start, zero, dead = weight[rows].float(), zero[rows], torch.signbit(factor.diagonal())
    delta, new_weight = torch.zeros_like(start), torch.zeros_like(start)  # delta is start - new_weight
    row_error = start.new_zeros(len(start))
    for a in range(0, columns, block_size):
        b = min(a + block_size, columns)
        own, current = factor[a:b, a:b].contiguous(), start[:, a:b].contiguous()
        for tile in tiles:
            current[tile] += _divided(delta[tile, :a] @ factor[:a, a:b], own)
        mask = keep_mask_of_team(_score(current, own), next(counts), team, never=zero[:, a:b])
        for tile in tiles:
            new_weight[tile, a:b], _, found = ops.obs_sweep(current[tile], own, mask=mask[tile])
            row_error[tile] += found
        delta[:, a:b] = (start[:, a:b] - new_weight[:, a:b]).masked_fill(dead[a:b], 0)
    return new_weight.to(weight.dtype), row_error


def _kept_of_blocks(zero: torch.Tensor, sparsity: float, block_size: int) -> list[int]:
    """Return how many weights of each block of columns are kept."""
    rows, columns = zero.shape
    if zero.any():
        return [int(kept) for kept in _kept_counts(zero, Unstructured(sparsity), "block", block_size)]
    borders = [*range(0, columns, block_size), columns]
    pruned = [pruned_count(rows * border, sparsity) for border in borders]
    return [rows * (b - a) - gone + before for a, b, before, gone in zip(borders, borders[1:], pruned, pruned[1:], strict=False)]


@full_float32()
def _sweep(
    weight: torch.Tensor, zero: torch.Tensor, factor: torch.Tensor, pattern: Pattern, scope: str, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose part by part of the columns from the current weights, and let the op sweep each part with the chosen mask.

    A part is an N:M group or a block. The op is given the part's current weights, in which the removals before it are compensated. What
    it adds to them is the same as in a sweep of all columns.
    """
    columns = weight.shape[1]
    part, step = (pattern.m, max(1, COLUMNS // pattern.m) * pattern.m) if isinstance(pattern, NM) else (block_size, block_size)
    counts = iter(_kept_counts(zero, pattern, scope, part))
    start, dead = weight.float(), torch.signbit(factor.diagonal())
    delta, new_weight = torch.zeros_like(start), torch.zeros_like(start)  # delta is start - new_weight
    row_error = start.new_zeros(len(weight))
    for first in range(0, columns, step):
        last = min(first + step, columns)
        pending = delta[:, :first] @ factor[:first, first:last]
        for a in range(first, last, part):
            b = min(a + part, last)
            error = pending[:, a - first : b - first] + delta[:, first:a] @ factor[first:a, a:b]
            own = factor[a:b, a:b].contiguous()
            current = start[:, a:b] + _divided(error, own)
            mask = _best(_score(current, own), zero[:, a:b], next(counts))
            new_weight[:, a:b], _, found = ops.obs_sweep(current, own, mask=mask)
            delta[:, a:b] = (start[:, a:b] - new_weight[:, a:b]).masked_fill(dead[a:b], 0)
            row_error += found
    return new_weight.to(weight.dtype), row_error


def _divided(error: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return `error @ factor^-1`, with a diagonal of 1 at dead features."""
    factor = factor.clone()
    diagonal = factor.diagonal()
    diagonal.masked_fill_(torch.signbit(diagonal), 1)
    return torch.linalg.solve_triangular(factor, error, upper=True, left=False)


def _score(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return the error of removing each weight, `|w| V_jj`, whose square has the same order; dead features cost nothing."""
    return weight.abs() * factor.diagonal().clamp(min=0)


def _best(scores: torch.Tensor, zero: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the mask of the highest scores among the non-zeros: `kept` of each row, or of all rows if there is one number."""
    ranked = scores.masked_fill(zero, -1).reshape(len(kept), -1)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    best = torch.arange(ranked.shape[1], device=order.device) < kept[:, None]
    return torch.zeros_like(best).scatter_(1, order, best).view_as(scores)


def _kept_counts(zero: torch.Tensor, pattern: Pattern, scope: str, part: int) -> Sequence[torch.Tensor]:
    """Return for each `part` columns how many non-zeros are kept: of each row, or of all rows together."""
    alive = torch.stack([(~columns).sum(1) for columns in zero.split(part, dim=1)])  # [parts, rows]
    if isinstance(pattern, NM):
        return list(alive.clamp(max=pattern.n))
    if scope != "row":
        alive = alive.sum(1, keepdim=True)
    total = zero.numel() // alive.shape[1]
    totals = alive.sum(0)
    excess = (totals - (total - pruned_count(total, pattern.sparsity))).clamp(min=0)
    until = alive.cumsum(0)
    # Whole numbers of any size: the product of two counts of a large matrix is beyond 64 bits.
    gone = [[e * u // max(t, 1) for e, u, t in zip(excess.tolist(), row, totals.tolist(), strict=True)] for row in until.tolist()]
    removed = torch.tensor(gone, device=zero.device)
    return list(alive - removed.diff(dim=0, prepend=torch.zeros_like(removed[:1])))
