"""The share of each rank in the calibration batches, and statistics of all of them that do not depend on the number of ranks.

The batches are divided into leaves, contiguous runs that are as long as one another. Each rank runs the batches of its own leaves. The
statistics of the leaves are added in the fixed tree of `TreeSum`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ...ranks import TreeSum, World, leaf_sizes
from ..batches import Batch

if TYPE_CHECKING:
    from typing_extensions import Self


class Share:
    """The batches that this rank runs.

    Attributes:
        world: the ranks.
        leaves: the numbers of the leaves of this rank.
        batches: its batches.
    """

    def __init__(self, world: World, batches: Sequence[Batch], leaves: int) -> None:
        """Deal batches.

        Args:
            world: the ranks.
            batches: all batches, the same on all ranks.
            leaves: the number of leaves, which the number of ranks divides.
        """
        own = leaves // world.size
        self.world, self.leaves = world, range(world.rank * own, (world.rank + 1) * own)
        ends = list(accumulate(leaf_sizes(len(batches), leaves)))
        self.batches: list[Batch] = []
        self._leaf: dict[int, int] = {}
        for leaf in self.leaves:
            for batch in batches[ends[leaf - 1] if leaf else 0 : ends[leaf]]:
                self._leaf[id(batch)] = leaf
                self.batches.append(batch)

    def leaf_of(self, batch: object) -> int:
        """Return the leaf of one of this rank's batches."""
        return self._leaf[id(batch)]


class Sums(Protocol):
    """Sums over batches. Each class of them has a method of its own that takes in a batch."""

    def merged(self, later: Self) -> Self:
        """Return the sums over the batches of both. Neither is used afterwards."""

    def add_over_ranks(self, world: World) -> None:
        """Replace the sums by those over the batches of all ranks. All ranks call this."""


SumsT = TypeVar("SumsT", bound=Sums)


class LeafSums(Generic[SumsT]):
    """The sums over each leaf of one rank, while its batches run one after another, and over all leaves of all ranks."""

    def __init__(self, make: Callable[[], SumsT], share: Share) -> None:
        """Prepare to take in batches.

        Args:
            make: makes empty sums.
            share: the batches of this rank.
        """
        self._make, self._share = make, share
        self._tree: TreeSum[SumsT] = TreeSum(lambda earlier, later: earlier.merged(later))
        self._leaf, self._current = share.leaves[0], make()

    def of(self, batch: Batch) -> SumsT:
        """Return the sums over the leaf of a batch, to which the batch is added. Batches come in their order."""
        while self._leaf < self._share.leaf_of(batch):
            self._next()
        return self._current

    def result(self) -> SumsT:
        """Return the sums over the batches of all ranks. All ranks call this."""
        while self._leaf < self._share.leaves[-1]:
            self._next()
        self._tree.put(self._current)
        found = self._tree.result()
        found.add_over_ranks(self._share.world)
        return found

    def _next(self) -> None:
        self._tree.put(self._current)
        self._leaf, self._current = self._leaf + 1, self._make()
