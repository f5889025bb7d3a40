"""Masks from scores, for the methods that choose weights without updating them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .. import ops
from ..pattern import NM, Pattern, pruned_count
from .solution import Team


def keep_mask(scores: torch.Tensor, pattern: Pattern, scope: str) -> torch.Tensor:
    """Return the mask of the highest `scores`, True where a weight is kept.

    N:M keeps N of each M consecutive inputs. A sparsity prunes exactly `floor(sparsity * count)` weights. Of equal scores the one
    of the lower index is kept.

    Args:
        scores: `[out_features, in_features]`.
        pattern: the pattern of the mask.
        scope: `"row"` counts a sparsity over each row, `"matrix"` over the whole matrix. N:M ignores it.
    """
    if isinstance(pattern, NM):
        return ops.nm_mask(scores, pattern)
    total = scores.shape[1] if scope == "row" else scores.numel()
    return ops.topk_mask(scores, total - pruned_count(total, pattern.sparsity), scope=scope)


def keep_mask_of_team(scores: torch.Tensor, keep: int, team: Team, never: torch.Tensor | None = None) -> torch.Tensor:
    """Return this process's rows of the mask of the `keep` highest scores in the rows of all processes.

    Of equal scores the one of the lower row-major index is kept. Histograms of the scores' bits are all that the processes exchange.

    Args:
        scores: `[rows, in_features]` float32 of at least 0.
        keep: the number of scores to keep in all rows.
        team: the processes. All of them call this.
        never: bool, True at scores that are kept last; None for none.
    """
    bits = scores.contiguous().view(torch.int32)
    if never is not None:
        bits = (bits + 1).masked_fill_(never, 0)
    upper = team.total(torch.bincount((bits >> 16).flatten(), minlength=1 << 15).cpu())
    if keep in (0, total := int(upper.sum())):
        return torch.full_like(bits, keep == total, dtype=torch.bool)
    high, above = _bin_of(upper, keep)
    lower = team.total(torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16).cpu())
    low, above_low = _bin_of(lower, keep - above)
    threshold = high << 16 | low
    equal = (bits == threshold).flatten()
    found = torch.zeros(team.size, dtype=torch.int64)
    found[team.place] = int(equal.sum())
    left = keep - above - above_low - int(team.total(found)[: team.place].sum())  # of equal ones for this process and later ones
    return (bits > threshold) | (equal & (equal.cumsum(0) <= left)).view_as(bits)


def global_kept_counts(scores: Sequence[Callable[[], torch.Tensor]], sparsity: float) -> list[int]:
    """Return how many weights each matrix keeps when `floor(sparsity * count)` are pruned, counted over all matrices together.

    Of equal scores those of the earlier matrix are kept. If each matrix then keeps as many of its own highest scores, of equal
    ones those of the lower index, the masks are those of one sort over all matrices. Two histograms find the exact threshold
    without that sort.

    Args:
        scores: a function for each matrix that returns its scores, float32 of at least 0. Each is called three times.
        sparsity: share of all weights to prune.
    """
    keep = sum(make().numel() for make in scores)
    keep -= pruned_count(keep, sparsity)
    # The bits of non-negative floats have the order of the floats: count by the upper half, then by the lower.
    upper = torch.zeros(1 << 15, dtype=torch.int64)
    for make in scores:
        upper += torch.bincount(_bits(make) >> 16, minlength=1 << 15).cpu()
    high, above = _bin_of(upper, keep)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in map(_bits, scores):
        lower += torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16).cpu()
    low, _ = _bin_of(lower, keep - above)
    counts, equal = [], []
    for make in scores:
        bits, threshold = _bits(make), high << 16 | low
        counts.append(int((bits > threshold).sum()))
        equal.append(int((bits == threshold).sum()))
    left = keep - sum(counts)
    for index, count in enumerate(equal):
        taken = min(count, left)
        counts[index] += taken
        left -= taken
    return counts


def _bits(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    return make().reshape(-1).view(torch.int32)


def _bin_of(histogram: torch.Tensor, rank: int) -> tuple[int, int]:
    """Return the bin of the `rank`-th largest entry, and the number of entries in higher bins."""
    from_the_top = histogram.flip(0).cumsum(0)
    place = int((from_the_top < rank).sum())
    return len(histogram) - 1 - place, int(from_the_top[place - 1]) if place else 0
