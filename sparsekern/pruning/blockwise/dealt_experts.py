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

    def __init__(self, routed: ExpertStatistics, world: World, batches: Sequence[Batch], most_bytes: int) -> None:
        """Tell all ranks how many tokens each expert was given, also `routed`. All ranks call this, once their batches have run.

        Args:
            routed: the calls of this rank's batches.
            world: the ranks.
            batches: all batches, the same on all ranks.
            most_bytes: the bytes that this rank has for the statistics of one pack.
        """
        self._routed, self._world, self._batches = routed, world, batches
        places = {id(batch): number for number, batch in enumerate(batches)}
        own = {
            name: [calls.kind, [(places[id(batch)], of, counts) for batch, of, counts in calls.counts]]
            for name, calls in routed.calls.items()
        }
        answers = world.gather("tokens of experts", {"bytes": most_bytes, "calls": own})
        self._most_bytes = min(answer["bytes"] for answer in answers)  # packs are the same on all ranks
        found = [answer["calls"] for answer in answers]
        self._counts: dict[str, list[Counts]] = {name: [rank[name][1] for rank in found] for name in own}
        self._like: dict[str, torch.Tensor] = {}
        for name, calls in routed.calls.items():
            dtype, width = next((rank[name][0] for rank in found if rank[name][0]), ("float32", 0))
            device = calls.experts.stacked(DOWN).device
            self._like[name] = torch.empty((0, width), dtype=getattr(torch, dtype), device=device)
        for name, calls in routed.calls.items():
            totals = [counts for rank in self._counts[name] for _, _, counts in rank]
            calls.tokens = [sum(column) for column in zip(*totals, strict=True)] if totals else calls.tokens

    def packs(self, leaves: int) -> list[list[Pack]]:
        """Return the packs of each rank, each of at least one expert, in a run with so many leaves."""
        unseen = {linear.name for linear in self._routed.unseen()}
        packs: list[Pack] = []
        for name, layer in self._routed.by_layer().items():
            chosen = [linears for linears in layer if linears[0].name not in unseen]
            if chosen:
                size = min(self._routed.fitting(chosen, self._most_bytes), -(-len(chosen) // (PARTS_OF_LEAF * leaves)))
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
        others = [world.rank ^ step for step in range(1, world.size)]
        swaps = [self._swap(mine, turn[other], other) for other in others]
        world.agree("experts")  # nothing can fail between here and the last swap but another rank
        for other, swap in zip(others, swaps, strict=True):
            for sent, received in swap.tensors:
                world.swap(sent, other, received)
                world.formula += sent.nbytes
            calls[other] = swap.received(self._batches)
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
        rooms = _Rooms(linears, result)
        reports = world.gather("experts", [asdict(result.layers[linear.name]) for linear in linears[world.rank]])
        for rank, layers in enumerate(reports):
            for linear, layer in zip(linears[rank], layers, strict=True):
                mine = rank == world.rank
                weight = rooms.holding(linear, result.weights[linear.name]) if mine else rooms.of(linear)
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

    def _swap(self, mine: Pack | None, theirs: Pack | None, other: int) -> _Swap:
        """Return what another rank gets of its experts' tokens, and room for what this rank gets of its own experts' in its batches."""
        sent = [call for expert in theirs.numbers for call in self._calls(theirs, expert)] if theirs else []
        expected = [self._expected(mine, expert, other) for expert in mine.numbers] if mine else []
        rows = sum(count for calls in expected for _, _, count in calls)
        like = self._like[mine.experts.name] if mine else torch.empty(0)
        pairs = (
            ([call.hidden for call in sent], like),
            ([call.weights.float() for call in sent], like.new_empty(0, dtype=torch.float32)),
            ([call.tokens for call in sent], like.new_empty(0, dtype=torch.int64)),
        )
        tensors = [(torch.cat(parts) if parts else own, own.new_empty((rows, *own.shape[1:]))) for parts, own in pairs]
        return _Swap(expected, tensors)


@dataclass(frozen=True)
class _Swap:
    """What two ranks give each other: hidden states, routing weights and tokens.

    Attributes:
        expected: for each expert of this rank, the batch, the tokens and the rows of each of its calls on the other rank.
        tensors: what is sent, and room for what comes.
    """

    expected: list[list[tuple[int, int, int]]]
    tensors: list[tuple[torch.Tensor, torch.Tensor]]

    def received(self, batches: Sequence[Batch]) -> list[list[RoutedBatch]]:
        """Return the calls of each expert, once the tensors are there."""
        sizes = [rows for calls in self.expected for _, _, rows in calls]
        hidden, weights, tokens = (received.split(sizes) for _, received in self.tensors)
        pieces = zip(hidden, weights, tokens, strict=True)
        return [[RoutedBatch(batches[number], *next(pieces), of) for number, of, _ in calls] for calls in self.expected]


class _Rooms:
    """Contiguous memory for weights that are sent or received.

    If results are written to the model, weights of one shape share it. Otherwise each has its own, which the result keeps.
    """

    def __init__(self, linears: Sequence[Sequence[Linear]], result: Solved) -> None:
        self._in_place = result.in_place
        self._rooms: dict[object, torch.Tensor] = {}
        for linear in (linear for own in linears for linear in own):
            weight, key = result.weights.get(linear.name), self._key(linear)
            if key not in self._rooms and (weight is None or not weight.is_contiguous()):
                self._rooms[key] = torch.empty_like(linear.weight, memory_format=torch.contiguous_format)

    def of(self, linear: Linear) -> torch.Tensor:
        """Return the memory for a linear."""
        return self._rooms[self._key(linear)]

    def holding(self, linear: Linear, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight of a linear, or a contiguous copy."""
        return weight if weight.is_contiguous() else self.of(linear).copy_(weight)

    def _key(self, linear: Linear) -> object:
        return (linear.shape, linear.weight.dtype, linear.weight.device) if self._in_place else linear.name
