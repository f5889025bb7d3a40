"""Solve the linears of a block by several processes, each of which has all weights and statistics, and leave all results on each.

`dealing.py` decides who solves what. A process that computes a factor passes it on, if others solve rows with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from ..._warnings import warnings_about
from ...methods import Gram, Solution
from ...ranks import World
from ...ranks.sums import packed_lower, unpack_lower
from ..seeds import seeded
from .dealing import Dealt, Place, SharedWork, deal, tiles_of
from .solving import Job, RowFigures, Solved, Solver, check_solution, named


@dataclass
class _Linear:
    """One linear, and what is known of its solution.

    Attributes:
        job: the linear.
        tiles: the rows of each piece.
        weight: the new weight, filled in piece by piece.
        figures: the errors and energies of the rows, `[2, out_features]` float64.
        seconds: by piece, those that this process took.
    """

    job: Job
    tiles: list[slice]
    weight: torch.Tensor
    figures: torch.Tensor
    seconds: dict[int, float] = field(default_factory=dict)


class SharedSolve:
    """The linears of one block that several processes solve.

    Attributes:
        dealt: who solves what.
    """

    def __init__(self, solver: Solver, world: World, leaves: int, jobs: Sequence[Job]) -> None:
        """Deal `jobs`, which are the same on all ranks, to the ranks of `world`, in a run with so many leaves."""
        self._solver, self._world, self._leaves = solver, world, leaves
        by_statistic: dict[int, list[_Linear]] = {}
        for job in jobs:
            by_statistic.setdefault(id(job.statistics), []).append(self._begun(job))
        self._sets = list(by_statistic.values())
        self.dealt: Dealt = deal([self._work(linears) for linears in self._sets], world.size)

    def solve(self, result: Solved) -> None:
        """Solve all of them. Every process calls this with the same jobs."""
        self._solve_turn(0)
        self._pass_factors_on()
        self._solve_turn(1)
        self._exchange()
        for linears in self._sets:
            for linear in linears:
                figures = RowFigures(*linear.figures) if isinstance(linear.job.inputs, Gram) else None
                seconds = sum(linear.seconds.values())
                with named(linear.job.linear.name):
                    self._solver.take(linear.job, linear.weight, figures, seconds, result)

    def _begun(self, job: Job) -> _Linear:
        weight, pattern = job.linear.weight, self._solver.plan.patterns[job.linear.name]
        rows = len(weight)
        tiles = tiles_of(rows, self._leaves) if self._solver.method.solves_rows_alone(pattern) else [slice(0, rows)]
        figures = torch.zeros(2, rows, dtype=torch.float64, device=weight.device)
        return _Linear(job, tiles, torch.empty_like(weight, memory_format=torch.contiguous_format), figures)

    def _work(self, linears: Sequence[_Linear]) -> SharedWork:
        """Return the work on linears with the same statistic."""
        method, costs, factor = self._solver.method, [], 0.0
        for linear in linears:
            rows, features = linear.job.linear.shape
            work = method.work(rows, features)
            measures = isinstance(linear.job.inputs, Gram) and linear.job.inputs is not linear.job.statistics
            factor = work.shared or (features**3 / 6 if measures else 0.0)
            costs += [work.own * (tile.stop - tile.start) / rows for tile in linear.tiles]
        return SharedWork(factor, tuple(costs))

    def _pieces(self) -> list[tuple[_Linear, int, Place]]:
        """Return each piece of each linear with its place, in the same order on all ranks."""
        found = []
        for linears, places in zip(self._sets, self.dealt.places, strict=True):
            pieces = [(linear, number) for linear in linears for number in range(len(linear.tiles))]
            found += [(linear, number, place) for (linear, number), place in zip(pieces, places, strict=True)]
        return found

    def _solve_turn(self, turn: int) -> None:
        own = Place(turn, self._world.rank)
        with self._solver.clock.phase("solve"):
            for linear, number, place in self._pieces():
                if place == own:
                    self._solve_piece(linear, number)

    def _solve_piece(self, linear: _Linear, number: int) -> None:
        solver, job, rows = self._solver, linear.job, linear.tiles[number]
        name, start = job.linear.name, solver.clock.now()
        weight = job.linear.weight[rows]
        with ExitStack() as stack:
            for context in (warnings_about(name), seeded(solver.seed, name), named(name)):
                stack.enter_context(context)
            solution: Solution = solver.method.solve(weight, job.statistics, solver.plan.patterns[name])
            check_solution(solver.method, solution, weight)
            if figures := solver.row_figures(weight, solution, job.inputs):
                linear.figures[:, rows] = torch.stack(figures)
        linear.weight[rows] = solution.weight
        linear.seconds[number] = solver.clock.now() - start

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

    def _exchange(self) -> None:
        """Give every rank the results of all."""
        world, pieces = self._world, self._pieces()
        seconds = [linear.seconds.get(number) for linear, number, place in pieces if place.rank == world.rank]
        with self._solver.clock.phase("exchange"):
            found = [iter(own) for own in world.gather("solved", seconds)]
            if world.size == 1:
                return
            for linear, number, place in pieces:
                linear.seconds[number] = next(found[place.rank])
                rows = linear.tiles[number]
                world.broadcast(linear.weight[rows].view(torch.uint8), place.rank)
                if place.rank == world.rank:
                    world.formula += linear.weight[rows].nbytes + linear.figures[:, rows].nbytes
            for rank in range(world.size):
                own = [linear.figures[:, linear.tiles[number]] for linear, number, place in pieces if place.rank == rank]
                if not own:
                    continue
                joined = torch.cat([part.reshape(-1) for part in own])
                world.broadcast(joined, rank)
                for part, values in zip(own, joined.split([part.numel() for part in own]), strict=True):
                    part.copy_(values.view_as(part))


def shares_work(jobs: Sequence[Job]) -> bool:
    """Return whether the jobs are worth dealing: those without a Gram matrix take less time than passing on their results."""
    return any(isinstance(job.inputs, Gram) for job in jobs)
