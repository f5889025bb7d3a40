"""Who does what: contiguous runs of batches for the leaves of a sum, and pieces of work by their cost."""

from __future__ import annotations

from collections.abc import Sequence

LEAVES = 8  # of a sum under torchrun, so that 1, 2, 4 and 8 processes add in the same order


def leaf_sizes(count: int, leaves: int) -> list[int]:
    """Return how many of `count` batches belong to each leaf, as even as possible, for each half of the leaves too.

    Example:
        >>> from sparsekern.ranks import leaf_sizes
        >>> leaf_sizes(10, 4)
        [2, 3, 2, 3]
    """
    return [(leaf + 1) * count // leaves - leaf * count // leaves for leaf in range(leaves)]


def deal(costs: Sequence[float], size: int) -> list[list[int]]:
    """Return for each of `size` ranks the numbers of its pieces of work: the most expensive one goes to the least busy rank first.

    Example:
        >>> from sparsekern.ranks import deal
        >>> deal([1, 5, 3, 2], 2)
        [[1], [0, 2, 3]]
    """
    busy = [0.0] * size
    dealt: list[list[int]] = [[] for _ in range(size)]
    for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
        rank = min(range(size), key=lambda rank: (busy[rank], rank))
        busy[rank] += costs[piece]
        dealt[rank].append(piece)
    return [sorted(pieces) for pieces in dealt]
