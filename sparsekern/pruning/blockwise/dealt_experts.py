"""Fused experts that are dealt to several processes.

Each process sends the tokens of an expert to the one process that solves it. So no Gram matrix is sent, and an expert sees its tokens in
the order of the batches, as in a single process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ...models import Linear
from ...models.experts import DOWN, Experts
from ...ranks import World
from ...ranks import deal as deal_pieces
from ...reports import LayerReport
from ..batches import Batch
from .dealing import PARTS_OF_LEAF
from .experts import ExpertStatistics, RoutedBatch, expert_of
from .solving import Solved
from .statistics import SharedStatistics

Counts = list[
    tuple[int, int, list[int]]
]  # of one rank: for each call the number of its batch, its tokens, and the rows of each expert


@dataclass(frozen=True)
class Pack:
    """A few experts of one layer that are solved together. Packs are the same for any number of processes.

    Attributes:
        experts: the layer.
        linears: the matrices of each expert.
    """

    experts: Experts
    linears: tuple[Sequence[Linear], ...]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the experts."""
        return [expert_of(linears[0]).expert for linears in self.linears]

    @property
    def all_linears(self) -> list[Linear]:
        """The matrices of all experts."""
        return [linear for linears in self.linears for linear in linears]


class DealtExperts:
    """The fused experts of one block, whose tokens are recorded on all ranks."""

    def __init__(self, routed: ExpertStatistics, world: World, batches: Sequence[Batch]) -> None:
        """Tell all ranks how many tokens each expert was given, also `routed`. All ranks call this, once their batches have run.

        Args:
            routed: the calls of this rank's batches.
            world: the ranks.
            batches: all batches, the same on all ranks.
        """
        self._routed, self._world, self._batches = routed, world, batches
        places = {id(batch): number for number, batch in enumerate(batches)}
        own = {
            name: [calls.kind, [(places[id(batch)], of, counts) for batch, of, counts in calls.counts]]
            for name, calls in routed.calls.items()
        }
        found = world.gather("tokens of experts", own)
        self._counts: dict[str, list[Counts]] = {name: [rank[name][1] for rank in found] for name in own}
        self._like: dict[str, torch.Tensor] = {}
        for name, calls in routed.calls.items():
            dtype, width = next((rank[name][0] for rank in found if rank[name][0]), ("float32", 0))
            device = calls.experts.stacked(DOWN).device
            self._like[name] = torch.empty((0, width), dtype=getattr(torch, dtype), device=device)
        for name, calls in routed.calls.items():
            totals = [counts for rank in self._counts[name] for _, _, counts in rank]
            calls.tokens = [sum(column) for column in zip(*totals, strict=True)] if totals else calls.tokens

    def packs(self, most_bytes: int, leaves: int) -> list[list[Pack]]:
        """Return the packs of each rank.

        Args:
            most_bytes: bytes of the statistics of one pack, which holds at least one expert.
            leaves: the number of leaves of the run.
        """
        unseen = {linear.name for linear in self._routed.unseen()}
        packs: list[Pack] = []
        for name, layer in self._routed.by_layer().items():
            chosen = [linears for linears in layer if linears[0].name not in unseen]
            if chosen:
                size = min(self._routed.fitting(chosen, most_bytes), -(-len(chosen) // (PARTS_OF_LEAF * leaves)))
                experts = self._routed.calls[name].experts
                packs += [Pack(experts, tuple(chosen[begin : begin + size])) for begin in range(0, len(chosen), size)]
        dealt = deal_pieces([self._cost(pack) for pack in packs], self._world.size)
        return [[packs[number] for number in own] for own in dealt]

    def statistics(self, turn: Sequence[Pack | None]) -> list[SharedStatistics]:
        """Return the statistics of each expert in the pack of this rank. All ranks call this.

        Args:
            turn: the pack of each rank; None for a rank without one.
        """
        world, mine = self._world, turn[self._world.rank]
        calls = {world.rank: [self._calls(mine, expert) for expert in mine.numbers] if mine else []}
        for step in range(1, world.size):
            other = world.rank ^ step
            calls[other] = self._swapped(mine, turn[other], other)
        return [
            self._routed.gathered(linears, [call for rank in range(world.size) for call in calls[rank][place]])
            for place, linears in enumerate(mine.linears if mine else ())
        ]

    def pass_on(self, packs: Sequence[Sequence[Pack]], result: Solved) -> None:
        """Give all ranks the results of all packs. Those of this rank's packs are in `result`."""
        world = self._world
        if world.size == 1:
            return
        linears = [[linear for pack in own for linear in pack.all_linears] for own in packs]
        reports = world.gather("experts", [asdict(result.layers[linear.name]) for linear in linears[world.rank]])
        for rank, layers in enumerate(reports):
            for linear, layer in zip(linears[rank], layers, strict=True):
                mine = rank == world.rank
                weight = result.weights[linear.name].contiguous() if mine else _room_for(linear.weight)
                world.broadcast(weight.view(torch.uint8), rank)
                world.formula += weight.nbytes if mine else 0
                result.take(linear, weight, LayerReport.from_dict(layer))

    def _cost(self, pack: Pack) -> float:
        """Return about how many multiply-adds the statistics and the solutions of a pack take."""
        tokens = self._routed.calls[pack.experts.name].tokens
        return sum(
            linear.features**2 * (tokens[expert_of(linear).expert] / 2 + linear.shape[0] / 2 + linear.features / 6)
            for linear in pack.all_linears
        )

    def _calls(self, pack: Pack, expert: int) -> list[RoutedBatch]:
        return list(self._routed.calls[pack.experts.name].of(expert))

    def _expected(self, pack: Pack, expert: int, rank: int) -> list[tuple[int, int, int]]:
        """Return the batch, the tokens and the rows of each call of an expert in the batches of another rank."""
        calls = self._counts[pack.experts.name][rank]
        return [(number, of, counts[expert]) for number, of, counts in calls if counts[expert]]

    def _swapped(self, mine: Pack | None, theirs: Pack | None, other: int) -> list[list[RoutedBatch]]:
        """Send another rank the tokens of its experts. Return the calls of this rank's experts in its batches, expert by expert."""
        sent = [call for expert in theirs.numbers for call in self._calls(theirs, expert)] if theirs else []
        expected = [self._expected(mine, expert, other) for expert in mine.numbers] if mine else []
        sizes = [rows for calls in expected for _, _, rows in calls]
        like = self._like[mine.experts.name] if mine else torch.empty(0)
        hidden = self._exchanged([call.hidden for call in sent], other, sum(sizes), like)
        weights = self._exchanged(
            [call.weights.float() for call in sent], other, sum(sizes), like.new_empty(0, dtype=torch.float32)
        )
        tokens = self._exchanged([call.tokens for call in sent], other, sum(sizes), like.new_empty(0, dtype=torch.int64))
        pieces = zip(hidden.split(sizes), weights.split(sizes), tokens.split(sizes), strict=True)
        return [[RoutedBatch(self._batches[number], *next(pieces), of) for number, of, _ in calls] for calls in expected]

    def _exchanged(self, parts: Sequence[torch.Tensor], other: int, rows: int, like: torch.Tensor) -> torch.Tensor:
        """Send parts one behind the other to another rank. Return the `rows` that it sends, which are like those of `like`."""
        sent, received = torch.cat(list(parts)) if parts else like, like.new_empty((rows, *like.shape[1:]))
        self._world.swap(sent, other, received)
        self._world.formula += sent.nbytes
        return received


def _room_for(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)
