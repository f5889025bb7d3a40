"""Counts of the zeros of weights, taken a tile of rows at a time, so that they need a few megabytes however large a weight is.

PyTorch turns truth values into int64 before it adds them up, which is 8 bytes an entry: four times a weight of 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

ENTRIES = 1 << 19  # of a tile


def nonzeros(tensor: torch.Tensor) -> torch.Tensor:
    """Return how many entries of a tensor are not zero, `[]` int64 on its device. NaN is not zero."""
    return _total(torch.count_nonzero(tile) for (tile,) in _tiles(tensor))


def lost_zeros(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return how many entries are zero in `before` and not in `after`, and how many are zero in `before`, `[2]` int64 on their device.

    Args:
        before: a weight `[out_features, in_features]`.
        after: a weight of the same shape.
    """
    zeros = before.numel() - nonzeros(before)
    kept = _total(torch.count_nonzero((old == 0) & (new == 0)) for old, new in _tiles(before, after))
    return torch.stack([zeros - kept, zeros])


def groups_over(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Return how many groups of `m` consecutive entries hold more than `n` that are not zero, `[]` int64 on the weight's device.

    Args:
        weight: `[out_features, in_features]`, with `in_features` divisible by `m`.
        n: entries that may be kept.
        m: entries of a group, at most 255.
    """
    return _total(torch.count_nonzero(counts > n) for counts in _counts_of_groups(weight, m))


def most_in_group(weight: torch.Tensor, m: int) -> torch.Tensor:
    """Return the most entries that are not zero in a group of `m` consecutive ones, `[]` uint8 on the weight's device.

    Args:
        weight: `[out_features, in_features]`, not empty, with `in_features` divisible by `m`.
        m: entries of a group, at most 255.
    """
    return torch.stack([counts.max() for counts in _counts_of_groups(weight, m)]).max()


def nonzeros_of_rows(weight: torch.Tensor) -> torch.Tensor:
    """Return how many entries of each row of a weight `[out_features, in_features]` are not zero, `[out_features]` int64."""
    return torch.cat([(tile != 0).sum(1) for (tile,) in _tiles(weight)])


def _counts_of_groups(weight: torch.Tensor, m: int) -> Iterator[torch.Tensor]:
    """Yield for tiles of rows how many entries of each group are not zero, `[rows, groups]` uint8."""
    groups = weight.shape[1] // m
    for (tile,) in _tiles(weight):
        yield (tile != 0).view(torch.uint8).reshape(len(tile), groups, m).sum(-1, dtype=torch.uint8)


def _total(counts: Iterator[torch.Tensor]) -> torch.Tensor:
    """Return the sum of counts. None but the sum outlives its tile, whose memory the next tile then takes as it is."""
    total = next(counts)
    for count in counts:
        total += count
    return total


def _tiles(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield tensors of one shape in tiles of rows, which hold at most `ENTRIES` entries or one row."""
    first = tensors[0]
    if first.numel() <= ENTRIES:
        yield tensors
        return
    height = max(1, ENTRIES * len(first) // first.numel())
    yield from zip(*(tensor.split(height) for tensor in tensors), strict=True)
