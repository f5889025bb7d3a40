"""Solve the linears of a block by several processes, each of which has all weights and statistics, and leave all results on each.

`dealing.py` decides who solves what. A process that computes a factor passes it on, if others solve rows with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch

from ..._counts import lost_zeros
from ..._warnings import warnings_about
from ...methods import Gram, Solution, Team
from ...ranks import World, leaf_sizes
from ...ranks.sums import add_over_ranks, packed_lower, unpack_lower
from ..seeds import seeded
from .dealing import TOGETHER, Dealt, Place, SharedWork, TeamWork, deal, tiles_of
from .messages import messages, pass_on, split_rows
from .solving import Job, RowFigures, Solved, Solver, check_solution, named, stacks_of

Taken = tuple[float, int, int]  # by a piece: seconds, and its zeros where they are counted
FEW = 64  # counts are sent as a message, more of them as a tensor


@dataclass
class _Linear:
    """One linear, and what is known of its solution.

    Attributes:
        job: the linear.
        pieces: the tiles of rows that are solved in one call, each in the order of the rows.
        in_tiles: True if the method solves tiles of a piece in steps that share counts.
        weight: the new weight, filled in piece by piece. It is that of the model where results are written in place.
        figures: the errors and energies of the rows, `[2, out_features]` float64.
        factor: what the factor takes that it shares with others, in multiply-adds.
        work: what the solution takes beside it, in multiply-adds, of which a rank that solves some tiles does `fixed`.
        together: True if all ranks solve it together.
        seconds: what the solution took, on all ranks together.
        lost: the zeros that were lost and those that were there before, see `Solved.lost`, where results are written in place.
    """

    job: Job
    pieces: list[list[slice]]
    in_tiles: bool
    weight: torch.Tensor
    figures: torch.Tensor
    factor: float
    work: TeamWork
    together: bool = False
    seconds: float = 0.0
    lost: tuple[int, int] = (0, 0)

    def take(self, seconds: float, lost: int, before: int) -> None:
        """Add what the solution of a piece took, and its zeros."""
        self.seconds += seconds
        self.lost = self.lost[0] + lost, self.lost[1] + before


@dataclass(frozen=True)
class _Piece:
    """Rows of one linear that one rank solves.

    Attributes:
        linear: the linear.
        tiles: the rows; none for a rank without any.
        place: when and where.
    """

    linear: _Linear
    tiles: Sequence[slice]
    place: Place

    @property
    def rows(self) -> slice:
        """All rows of the tiles, which follow one another."""
        return slice(self.tiles[0].start, self.tiles[-1].stop) if self.tiles else slice(0, 0)


class _Ranks(Team):
    """All ranks, which solve one linear together."""

    def __init__(self, world: World) -> None:
        self._world, self.place, self.size = world, world.rank, world.size

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        self._world.check()
        if counts.numel() > FEW:
            add_over_ranks(self._world, counts)
            return counts
        found = self._world.gather("counts", counts.tolist())
        return torch.tensor(found, dtype=counts.dtype).sum(0)


class SharedSolve:
    """The linears of one block that several processes solve.

    Attributes:
        dealt: who solves what.
    """

    def __init__(self, solver: Solver, world: World, leaves: int, jobs: Sequence[Job], *, in_place: bool = False) -> None:
        """Deal work.

        Args:
            solver: solves the pieces of this rank.
            world: the ranks.
            leaves: the number of leaves of the run.
            jobs: the linears, the same on all ranks.
            in_place: write each piece to the model as it is solved, see `Solved.in_place`.
        """
        self._solver, self._world, self._leaves, self._in_place = solver, world, leaves, in_place
        by_statistic: dict[int, list[_Linear]] = {}
        for job in jobs:
            by_statistic.setdefault(id(job.statistics), []).append(self._begun(job))
        self._sets = list(by_statistic.values())
        self._works: list[SharedWork] = []
        self._teams: dict[tuple[int, int], TeamWork] = {}
        for index, linears in enumerate(self._sets):
            work, teams = self._work(linears)
            self._works.append(work)
            self._teams |= {(index, number): team for number, team in teams.items()}
        self.dealt: Dealt = self._deal()
        self._pieces = [piece for index in range(len(self._sets)) for piece in self._placed(index)]

    def solve(self, result: Solved) -> None:
        """Solve all of them. Every process calls this with the same jobs."""
        taken: dict[int, Taken] = {}
        self._solve_turn(TOGETHER, taken)
        self._solve_turn(0, taken)
        self._pass_factors_on()
        self._solve_turn(1, taken)
        self._exchange(taken)
        self._learn()
        for linears in self._sets:
            for linear in linears:
                figures = RowFigures(*linear.figures) if isinstance(linear.job.inputs, Gram) else None
                with named(linear.job.linear.name):
                    lost = linear.lost if self._in_place else None
                    self._solver.take(linear.job, linear.weight, figures, linear.seconds, result, lost)

    def _deal(self) -> Dealt:
        """Deal the work by the seconds that the last blocks took for each part of it, where they are known."""
        known = self._solver.rates
        usual = fmean([rate for (_, together), rate in known.items() if not together] or known.values() or [1.0])
        rates = [known.get((_shapes(linears), False), usual) for linears in self._sets]
        works = [work.scaled(rate) for work, rate in zip(self._works, rates, strict=True)]
        teams = {
            key: team.scaled(known.get((_shapes(self._sets[key[0]]), True), rates[key[0]])) for key, team in self._teams.items()
        }
        return deal(works, self._world.size, teams)

    def _learn(self) -> None:
        """Remember what the work on each set took, which all ranks have been told.

        Work that ranks do together takes longer than its count says, since they wait for one another. So it has a rate of its own.
        """
        for linears, work in zip(self._sets, self._works, strict=True):
            size, divided = self._world.size, any(linear.together for linear in linears)
            counted = {True: size * work.factor if divided else 0.0, False: 0.0 if divided else work.factor}
            seconds = {True: 0.0, False: 0.0}
            for linear in linears:
                times = size if linear.together else len(linear.pieces)
                counted[linear.together] += times * linear.work.fixed + linear.work.divided
                seconds[linear.together] += linear.seconds
            for together in (True, False):
                if counted[together] > 0 and seconds[together] > 0:
                    self._solver.rates[_shapes(linears), together] = seconds[together] / counted[together]

    def _begun(self, job: Job) -> _Linear:
        weight, pattern = job.linear.weight, self._solver.plan.patterns[job.linear.name]
        rows, method = len(weight), self._solver.method
        tiles, in_tiles = tiles_of(rows, self._leaves), False
        if method.solves_rows_alone(pattern):
            pieces = [[tile] for tile in tiles]
        else:
            in_tiles = method.solves_tiles(pattern)
            pieces = [tiles if in_tiles else [slice(0, rows)]]
        figures = torch.zeros(2, rows, dtype=torch.float64, device=weight.device)
        new = weight if self._in_place else torch.empty_like(weight, memory_format=torch.contiguous_format)
        features = job.linear.shape[1]
        work = method.work(rows, features)
        factor, own = work.shared, work.own
        if isinstance(job.inputs, Gram):  # the error is measured by a factor that the method may not need
            factor, own = factor or features**3 / 6, own + rows * features**2 / 2
        return _Linear(job, pieces, in_tiles, new, figures, factor, TeamWork(work.fixed, own, len(tiles)))

    def _work(self, linears: Sequence[_Linear]) -> tuple[SharedWork, dict[int, TeamWork]]:
        """Return the work on linears with the same statistic, and that on the pieces that can be divided, by their numbers."""
        costs: list[float] = []
        teams: dict[int, TeamWork] = {}
        for linear in linears:
            rows = linear.job.linear.shape[0]
            if linear.in_tiles:
                teams[len(costs)] = linear.work
            shares = [sum(tile.stop - tile.start for tile in piece) / rows for piece in linear.pieces]
            costs += [linear.work.fixed + linear.work.divided * share for share in shares]
        return SharedWork(linears[0].factor, tuple(costs)), teams

    def _placed(self, index: int) -> Iterator[_Piece]:
        """Yield the pieces of a set with their places, in the same order on all ranks."""
        pieces = [(linear, tiles) for linear in self._sets[index] for tiles in linear.pieces]
        for (linear, tiles), place in zip(pieces, self.dealt.places[index], strict=True):
            if place.turn != TOGETHER:
                yield _Piece(linear, tiles, place)
                continue
            begin, linear.together = 0, True
            for rank, count in enumerate(leaf_sizes(len(tiles), self._world.size)):
                yield _Piece(linear, tiles[begin : begin + count], Place(TOGETHER, rank))
                begin += count

    def _solve_turn(self, turn: int, taken: dict[int, Taken]) -> None:
        """Solve the pieces of this rank in a turn. `taken` is given the seconds and zeros of each, by its number."""
        own = Place(turn, self._world.rank)
        with self._solver.clock.phase("solve"):
            for number, piece in enumerate(self._pieces):
                if piece.place == own:
                    start = self._solver.clock.now()
                    lost, before = self._solve_piece(piece)
                    taken[number] = self._solver.clock.now() - start, lost, before

    def _solve_piece(self, piece: _Piece) -> tuple[int, int]:
        """Solve a piece. Return its zeros, see `Solved.lost`, where results are written in place."""
        solver, job = self._solver, piece.linear.job
        name, rows = job.linear.name, piece.rows
        weight = job.weight[rows]
        with ExitStack() as stack:
            for context in (warnings_about(name), seeded(solver.seed, name), self._named(name)):
                stack.enter_context(context)
            solution = self._solution(piece)
            check_solution(solver.method, solution, weight)
            for tile in piece.tiles:
                inside = slice(tile.start - rows.start, tile.stop - rows.start)
                error = None if solution.row_error is None else solution.row_error[inside]
                if figures := solver.row_figures(weight[inside], Solution(solution.weight[inside], error), job.inputs):
                    piece.linear.figures[:, tile] = torch.stack(figures)
        lost, before = lost_zeros(job.linear.weight[rows], solution.weight).tolist() if self._in_place else (0, 0)
        piece.linear.weight[rows] = solution.weight
        return lost, before

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Put the name of a linear in front of the messages of this rank's errors. In those of others it is there."""
        try:
            yield
        except ValueError as error:
            if self._world.has_raised(error):
                raise
            with named(name):
                raise

    def _solution(self, piece: _Piece) -> Solution:
        method, job = self._solver.method, piece.linear.job
        weight, pattern = job.weight, self._solver.plan.patterns[job.linear.name]
        if piece.place.turn == TOGETHER:
            return method.solve_tiles(weight, piece.tiles, job.statistics, pattern, _Ranks(self._world))
        with self._world.stoppable():
            if piece.linear.in_tiles:
                return method.solve_tiles(weight, piece.tiles, job.statistics, pattern, Team())
            return method.solve(weight[piece.rows], job.statistics, pattern)

    def _pass_factors_on(self) -> None:
        world, passed = self._world, [index for index in range(len(self._sets)) if self.dealt.passed_on(index)]
        if not passed:
            return
        grams = {index: inputs for index in passed if isinstance(inputs := self._sets[index][0].job.inputs, Gram)}
        own = {index: gram for index, gram in grams.items() if self.dealt.owners[index] == world.rank}
        with self._solver.clock.phase("exchange"):
            known = [
                {int(index): head for index, head in heads.items()}
                for heads in world.gather("factors", {str(index): [gram.damping, gram.shift] for index, gram in own.items()})
            ]
            for index, gram in grams.items():
                owner = self.dealt.owners[index]
                factor = gram.any_factor() if owner == world.rank else torch.zeros_like(gram.gram)
                packed = packed_lower(factor.T)
                world.broadcast(packed, owner)
                world.formula += len(factor) * (len(factor) + 1) / 2 * factor.itemsize if owner == world.rank else 0
                if owner != world.rank:
                    unpack_lower(packed, factor.T)
                    gram.take_factor(factor, *known[owner][index])

    def _exchange(self, taken: dict[int, Taken]) -> None:
        """Give every rank the results of all."""
        world = self._world
        with self._solver.clock.phase("exchange"):
            for own in world.gather("solved", list(taken.items())):
                for number, found in own:
                    self._pieces[number].linear.take(*found)
            if world.size == 1:
                return
            for rank in range(world.size):
                own = [piece for piece in self._pieces if piece.place.rank == rank and piece.tiles]
                weights = [part for piece in own for part in split_rows(piece.linear.weight[piece.rows])]
                parts = weights + [piece.linear.figures[:, piece.rows] for piece in own]
                for together in messages(parts):
                    pass_on(world, together, rank)


def solve_shared(solver: Solver, world: World, leaves: int, jobs: Sequence[Job], result: Solved) -> None:
    """Solve linears, by all processes where that is worth it. Every process calls this with the same jobs.

    Without a Gram matrix it takes less time to solve a linear than to pass its solution on.

    Args:
        solver: solves a linear.
        world: the processes.
        leaves: the number of parts that statistics are summed in. A run of one part is not divided.
        jobs: the linears.
        result: takes the solutions.
    """
    if leaves > 1 and any(isinstance(job.inputs, Gram) for job in jobs):
        SharedSolve(solver, world, leaves, jobs, in_place=result.in_place).solve(result)
        return
    for stack in stacks_of(solver, jobs):
        if len(stack) > 1:
            solver.solve_stack(stack, result)
        else:
            solver.solve(stack[0], result)


def _shapes(linears: Sequence[_Linear]) -> tuple[tuple[int, int], ...]:
    return tuple(linear.job.linear.shape for linear in linears)
