"""Which of several processes solves which part of a block.

Linears with the same inputs share a factor, which one process computes. Their rows are solved in pieces: tiles of rows where the method
solves rows alone, whole linears otherwise. Tiles depend on the numbers of rows and of leaves, not on the number of processes, and so do
the results.

Where rows share only counts, a whole linear is either a piece, or all processes solve it together, each some of its tiles. The longest
linears are solved together, as many as make the block take the least time. This comes first.

Then there are two turns. In the first, each process computes its factors, each with the first piece that needs it. Those that are done before
the longest factor solve pieces that need no factor of another process. Then the factors are passed on, and in the second turn any process
solves any piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

PARTS_OF_LEAF = 2  # there are at least as many leaves as processes; twice as many parts of the work even it out
FEWEST_ROWS = 64  # of a tile: with fewer, a factor is read too often for what is computed with it
ROWS_TOGETHER = 16  # that kernels take at once
TOGETHER = -1  # the turn of what all processes solve together


@dataclass(frozen=True)
class SharedWork:
    """The work on linears with the same inputs, in multiply-adds or seconds.

    Attributes:
        factor: what one process does before the pieces can be solved; 0 if they need nothing in common.
        pieces: what each piece takes.
    """

    factor: float
    pieces: tuple[float, ...]

    @property
    def total(self) -> float:
        """All of the work."""
        return self.factor + sum(self.pieces)

    def scaled(self, rate: float) -> SharedWork:
        """Return the work in another unit, of which a multiply-add takes `rate`."""
        return SharedWork(rate * self.factor, tuple(rate * piece for piece in self.pieces))


@dataclass(frozen=True)
class TeamWork:
    """The work on a piece that all processes can solve together, in multiply-adds or seconds.

    Attributes:
        fixed: what each of them does.
        divided: what they divide.
        tiles: the number of tiles that they divide it by.
    """

    fixed: float
    divided: float
    tiles: int

    def of_one(self, size: int) -> float:
        """Return what the busiest of `size` processes does."""
        return self.fixed + self.divided * -(-self.tiles // size) / self.tiles

    def scaled(self, rate: float) -> TeamWork:
        """Return the work in another unit, of which a multiply-add takes `rate`."""
        return replace(self, fixed=rate * self.fixed, divided=rate * self.divided)


@dataclass(frozen=True)
class Place:
    """When and where a piece is solved.

    Attributes:
        turn: 0 before the factors are passed on, 1 afterwards; `TOGETHER` before both, by all processes.
        rank: the process; 0 for all.
    """

    turn: int
    rank: int


@dataclass(frozen=True)
class Dealt:
    """The rank of each part of the work.

    Attributes:
        owners: for each set of linears with the same inputs, the rank that computes the factor; any rank where they need none.
        places: for each set, the place of each piece.
        longest: what the busiest rank of each turn does, summed over all turns, in the unit of the work.
    """

    owners: tuple[int, ...]
    places: tuple[tuple[Place, ...], ...]
    longest: float

    def passed_on(self, index: int) -> bool:
        """Return whether the factor of a set is needed by other ranks than its owner."""
        return any(place.turn == 1 for place in self.places[index])


def tiles_of(rows: int, leaves: int) -> list[slice]:
    """Return the tiles of a linear with so many rows, in a run with so many leaves."""
    height = max(FEWEST_ROWS, -(-rows // (PARTS_OF_LEAF * leaves)))
    height = -(-height // ROWS_TOGETHER) * ROWS_TOGETHER
    return [slice(begin, min(begin + height, rows)) for begin in range(0, rows, height)]


def deal(works: Sequence[SharedWork], size: int, divisible: Mapping[tuple[int, int], TeamWork] = MappingProxyType({})) -> Dealt:
    """Deal work to `size` ranks: the longest part first, to the rank with the least so far.

    The result depends on the arguments alone, so that all ranks agree.

    Args:
        works: the work on linears with the same inputs.
        size: the number of ranks.
        divisible: pieces that may be solved together, by set and number.
    """
    longest_first = sorted(divisible, key=lambda key: (-divisible[key].of_one(1), *key))
    counts = range(len(longest_first) + 1 if size > 1 else 1)
    found = [_dealt(works, size, {key: divisible[key] for key in longest_first[:count]}) for count in counts]
    return min(found, key=lambda dealt: dealt.longest)


def _dealt(works: Sequence[SharedWork], size: int, together: Mapping[tuple[int, int], TeamWork]) -> Dealt:
    """Deal the work, of which some is solved together. Each rank computes the factors for that itself, and needs them from no other."""
    everywhere = {index for index, _ in together}
    common = sum(work.of_one(size) for work in together.values()) + sum(works[index].factor for index in everywhere)
    loads, owners = [common] * size, [0] * len(works)
    places: dict[tuple[int, int], Place] = dict.fromkeys(together, Place(TOGETHER, 0))

    def take(cost: float) -> int:
        rank = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[rank] += cost
        return rank

    needing = [replace(work, factor=0.0) if index in everywhere else work for index, work in enumerate(works)]
    factors = [(work.factor + work.pieces[0], index, 0) for index, work in enumerate(needing) if work.factor]
    alone = [piece for piece in _pieces(needing, with_factor=False) if piece[1:] not in together]
    for cost, index, number in _longest_first([*factors, *alone]):
        owners[index] = take(cost)
        places[index, number] = Place(0, owners[index])
    end, later = max(loads), []
    for cost, index, number in _longest_first(_pieces(needing, with_factor=True)):
        owner = owners[index]
        if size == 1 or loads[owner] + cost <= end:
            loads[owner] += cost
            places[index, number] = Place(0, owner)
        else:
            later.append((cost, index, number))
    if later:
        loads = [max(loads)] * size
    for cost, index, number in later:
        places[index, number] = Place(1, take(cost))
    by_set = tuple(tuple(places[index, number] for number in range(len(work.pieces))) for index, work in enumerate(works))
    return Dealt(tuple(owners), by_set, max(loads))


def _pieces(works: Sequence[SharedWork], *, with_factor: bool) -> list[tuple[float, int, int]]:
    """Return the pieces that follow a factor and its first piece, or those that need none, as cost, set and number."""
    return [
        (cost, index, number)
        for index, work in enumerate(works)
        if bool(work.factor) == with_factor
        for number, cost in enumerate(work.pieces)
        if number or not with_factor
    ]


def _longest_first(parts: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    return sorted(parts, key=lambda part: (-part[0], *part[1:]))
