"""Solve linears by a method, check what it returns, and report the outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ..._counts import groups_over, lost_zeros, nonzeros
from ..._warnings import warnings_about
from ...methods import Gram, LinearMethod, Magnitude, Solution
from ...methods.correction import Correction
from ...methods.statistics import InputStatistic, Statistic, inputs_of
from ...methods.together import solve_rows_together
from ...models import Linear
from ...pattern import NM, Pattern, Unstructured
from ...ranks import World
from ...reports import LayerReport
from ..mixtures import DENSE, ERROR
from ..plan import Plan, shortened
from ..progress import Clock, Notices
from ..seeds import seeded
from ..store import STAYED_DENSE, has_zeros_of
from .statistics import SharedStatistics

MOST_STACKED = 2**26  # weights solved as one: more of them keep a device busy by themselves, and would take too much of its memory


@dataclass(frozen=True)
class Job:
    """One linear to solve.

    Attributes:
        linear: the linear.
        statistics: what the method needs; None for a method without calibration data.
        inputs: the statistic of its inputs, to measure the error; None where it is not measured.
        target: what is pruned in place of its weight; None prunes its weight.
    """

    linear: Linear
    statistics: Statistic | None = None
    inputs: InputStatistic | None = None
    target: Correction | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The weight to prune."""
        return self.linear.weight if self.target is None else self.target.weight

    @property
    def shares(self) -> dict[str, float] | None:
        """The entry `correction` of its report."""
        return None if self.target is None else self.target.shares()


class RowFigures(NamedTuple):
    """Figures of the rows of a solution, `[rows]` float64 each.

    Attributes:
        error: the squared output error.
        energy: the squared output of the dense row.
    """

    error: torch.Tensor
    energy: torch.Tensor


@dataclass
class Solved:
    """What is solved of a block so far; see `BlockResult`.

    Attributes:
        in_place: write each weight to the model as it is solved, so that no second copy of the block is in memory. This is for blocks
            of a streamed model, which are read again after an error.
        lost: of weights that were written, how many were zero before and are not afterwards, and how many were zero before.
    """

    in_place: bool = False
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: dict[str, LayerReport] = field(default_factory=dict)
    totals: dict[str, torch.Tensor] = field(default_factory=dict)
    lost: tuple[int, int] = (0, 0)

    def take(self, linear: Linear, weight: torch.Tensor, layer: LayerReport, lost: tuple[int, int] | None = None) -> None:
        """Keep the result of one linear.

        Args:
            linear: the linear.
            weight: its new weight.
            layer: its report.
            lost: what `Solved.lost` counts, of a weight that is in the model already; None where it is not.
        """
        if self.in_place:
            gone, before = lost_zeros(linear.weight, weight).tolist() if lost is None else lost
            self.lost = self.lost[0] + gone, self.lost[1] + before
            if lost is None:
                linear.weight.copy_(weight)
            weight = linear.weight
        self.weights[linear.name], self.layers[linear.name] = weight, layer


class Solver:
    """The method of a run, and all that it needs to solve linears.

    Attributes:
        rates: seconds for each multiply-add that the method counts, by the shapes of linears with the same inputs, and whether all processes
            solved them together. They are those of the block that several processes last solved so.
    """

    def __init__(self, method: LinearMethod, plan: Plan, seed: int, clock: Clock, world: World | None = None) -> None:
        self.method, self.plan, self.seed, self.clock, self.world = method, plan, seed, clock, world or World()
        self.notices = Notices()
        self.rates: dict[tuple[tuple[tuple[int, int], ...], bool], float] = {}
        self._unseen: list[str] = []

    def solve(self, job: Job, result: Solved) -> None:
        """Solve one linear."""
        with self.clock.phase("solve"):
            self._solve_alike([job], self.method, LinearMethod.solve_many, result)

    def solve_stack(self, jobs: Sequence[Job], result: Solved) -> None:
        """Solve linears of one dtype, pattern and statistic as one weight of all their rows, which the method solves alone."""
        with self.clock.phase("solve"):
            self._solve_alike(jobs, self.method, solve_rows_together, result)

    def solve_many(self, jobs: Sequence[Job], result: Solved) -> None:
        """Solve several linears, those of one shape and pattern in one call of the method."""
        alike: dict[tuple[object, ...], list[Job]] = {}
        for job in jobs:
            weight, pattern = job.linear.weight, self.plan.patterns[job.linear.name]
            alike.setdefault((weight.shape, weight.dtype, _same(pattern)), []).append(job)
        for group in alike.values():
            with self.clock.phase("solve"):
                self._solve_alike(group, self.method, type(self.method).solve_many, result)

    def solve_unseen(self, linears: Sequence[Linear], result: Solved) -> None:
        """Deal with linears that no calibration token reached, as the rules of the plan say.

        Raises:
            ValueError: the rules say that it is an error.
        """
        self.refuse_unseen(linears)
        magnitude = Magnitude()
        for linear in linears:
            self._unseen.append(linear.name)
            known = isinstance(self.plan.patterns[linear.name], (NM, Unstructured))
            with self.clock.phase("solve"):
                if self.plan.rules.unseen == DENSE or not known:
                    zeros = linear.weight.numel() - int(nonzeros(linear.weight))
                    layer = LayerReport(linear.name, STAYED_DENSE, linear.shape, zeros, None, 0.0)
                    result.take(linear, linear.weight.clone(), layer)
                else:
                    self._solve_alike([Job(linear)], magnitude, LinearMethod.solve_many, result)

    def refuse_unseen(self, linears: Sequence[Linear]) -> None:
        """Raise `ValueError` if the rules say that linears without a token are an error, and there are any."""
        if linears and self.plan.rules.unseen == ERROR:
            raise ValueError(
                f"unseen: no calibration token reached {shortened([linear.name for linear in linears])}; calibrate with more text, or "
                "choose 'magnitude' or 'dense'. This block is unchanged; the blocks before it are pruned"
            )

    def say_unseen(self) -> None:
        """Warn once of all linears that no calibration token reached."""
        if self._unseen:
            done = "stay dense" if self.plan.rules.unseen == DENSE else "are pruned by magnitude"
            self.notices.once("unseen", f"no calibration token reached {shortened(self._unseen)}, which {done}")

    def say_lost_zeros(self, linears: Sequence[Linear], result: Solved) -> None:
        """Warn once if weights that were zero before pruning are not zero in `result`. Only what was solved in place is in the model."""
        count, before = result.lost
        if not result.in_place:
            count, before = torch.stack([lost_zeros(own.weight, result.weights[own.name]) for own in linears]).sum(0).tolist()
        if count:
            self.notices.once(
                "lost zeros",
                f"{linears[0].name} to {linears[-1].name}: {count:,} of {before:,} weights that were zero before pruning are not zero "
                "afterwards; methods with keep_zeros=True keep them",
            )

    def check_statistic(self, members: Sequence[Linear], statistic: InputStatistic) -> None:
        """Give notice if the inputs of some linears leave much to the damping."""
        name, features = members[0].name, members[0].features
        if self.method.needs is not None and inputs_of(self.method.needs) is Gram:
            self.notices.few_tokens(name, statistic.tokens, features)
        if dead := int((statistic.sum_squares == 0).sum()):
            self.notices.once(
                "dead features",
                f"{name}: {dead} of {features} input features were never active in calibration; their weights are pruned first",
            )

    def outcome(
        self, linear: Linear, solution: Solution, inputs: InputStatistic | None, weight: torch.Tensor | None = None
    ) -> tuple[int, float | None]:
        """Return the number of zeros, and the relative error if it is known. The device is read once for each linear.

        Args:
            linear: the linear.
            solution: its solution.
            inputs: the statistic of its inputs.
            weight: the weight that was solved for; None is that of the linear.

        Raises:
            ValueError: the solution is not pruned to the pattern of the linear.
        """
        weight = linear.weight if weight is None else weight
        return self._judged(linear, solution.weight, self.row_figures(weight, solution, inputs))

    def row_figures(self, weight: torch.Tensor, solution: Solution, inputs: InputStatistic | None) -> RowFigures | None:
        """Return the figures of each row of a solution; None where they are not measured.

        Args:
            weight: the weight, or some of its rows.
            solution: its solution.
            inputs: the statistic of its inputs.
        """
        if not isinstance(inputs, Gram):
            return None
        error = solution.row_error
        if error is None:
            error = inputs.row_energy(solution.weight.float() - weight.float())
        return RowFigures(error.double(), inputs.row_energy(weight))

    def take(
        self,
        job: Job,
        weight: torch.Tensor,
        figures: RowFigures | None,
        seconds: float,
        result: Solved,
        lost: tuple[int, int] | None = None,
    ) -> None:
        """Check a new weight, and keep it with its report. See `Solved.take` for `lost`.

        Raises:
            ValueError: the weight is not pruned to the pattern of the linear.
        """
        linear = job.linear
        zeros, error = self._judged(linear, weight, figures)
        pattern = str(self.plan.patterns[linear.name])
        layer = LayerReport(linear.name, pattern, linear.shape, zeros, error, seconds, correction=job.shares)
        result.take(linear, weight, layer, lost)

    def _judged(self, linear: Linear, weight: torch.Tensor, figures: RowFigures | None) -> tuple[int, float | None]:
        pattern = self.plan.patterns[linear.name]
        over = groups_over(weight, pattern.n, pattern.m) if isinstance(pattern, NM) else weight.new_zeros(())
        found = [nonzeros(weight).double(), over.double(), *(own.sum() for own in figures or ())]
        kept, over_many, *sums = torch.stack(found).tolist()
        zeros = weight.numel() - int(kept)
        if over_many or not has_zeros_of(pattern, weight.shape, zeros):
            raise ValueError(f"expected a solution pruned to {pattern}, got {zeros:,} zeros of {weight.numel():,} weights")
        if not sums:
            return zeros, None
        error, energy = sums
        return zeros, error / energy if energy else 0.0

    def _solve_alike(
        self, jobs: Sequence[Job], method: LinearMethod, solve_many: Callable[..., list[Solution]], result: Solved
    ) -> None:
        start = self.clock.now()
        pattern = self.plan.patterns[jobs[0].linear.name]

        @contextmanager
        def about(index: int) -> Iterator[None]:
            name = jobs[index].linear.name
            with warnings_about(name), seeded(self.seed, name), named(name), self.world.stoppable():
                yield

        weights, statistics = [job.weight for job in jobs], [job.statistics for job in jobs]
        solutions = solve_many(method, weights, statistics, pattern, about)
        if len(solutions) != len(jobs):
            raise TypeError(
                f"method: expected {type(method).__name__}.solve_many to return {len(jobs)} solutions, got {len(solutions)}"
            )
        outcomes: list[tuple[int, float | None, float | None]] = []
        for job, solution in zip(jobs, solutions, strict=True):
            with named(job.linear.name):
                check_solution(method, solution, job.weight)
                outcomes.append((*self.outcome(job.linear, solution, job.inputs, job.weight), _values_error(solution, job)))
        seconds, rows = self.clock.now() - start, sum(len(weight) for weight in weights)
        for job, solution, (zeros, error, values_error) in zip(jobs, solutions, outcomes, strict=True):
            linear = job.linear
            layer = LayerReport(linear.name, str(pattern), linear.shape, zeros, error, seconds * linear.shape[0] / rows)
            result.take(linear, solution.weight, replace(layer, values_error=values_error, correction=job.shares))


def _values_error(solution: Solution, job: Job) -> float | None:
    """Return the part of the relative error that rounding made; None where nothing is rounded or measured."""
    if solution.values_error is None or not isinstance(job.inputs, Gram):
        return None
    energy = float(job.inputs.row_energy(job.weight).sum())
    return float(solution.values_error.sum()) / energy if energy else 0.0


def jobs_of(shared: SharedStatistics) -> tuple[list[Job], list[Linear]]:
    """Return the linears to solve with their statistics, and those that no token reached."""
    unseen = shared.unseen()
    jobs = []
    for members, inputs in shared.groups:
        measured = inputs if inputs.tokens or inputs.sum_squares.any() else None
        jobs += [Job(linear, shared.of(linear, inputs), measured) for linear in members if linear not in unseen]
    return jobs, unseen


def stacks_of(solver: Solver, jobs: Sequence[Job]) -> list[list[Job]]:
    """Return linears in stacks to solve as one weight each: those with one Gram matrix, if their rows are solved alone.

    By count, a sweep of few rows on a GPU waits for launches more than for arithmetic. On a CPU each linear is a stack by itself.
    """
    found: list[list[Job]] = []
    open_stacks: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        weight, pattern = job.weight, solver.plan.patterns[job.linear.name]
        key = id(job.statistics), _same(pattern), weight.dtype
        stack = open_stacks.get(key, [])
        if stack and weight.numel() + sum(other.weight.numel() for other in stack) <= MOST_STACKED:
            stack.append(job)
            continue
        found.append([job])
        if waits_for_launches(weight) and isinstance(job.statistics, Gram) and solver.method.solves_rows_alone(pattern):
            open_stacks[key] = found[-1]
    return found


def waits_for_launches(weight: torch.Tensor) -> bool:
    """Return whether one call for more rows takes less time than more calls, on the device of a weight."""
    return weight.is_cuda


def _same(pattern: Pattern) -> object:
    """Return what is equal for equal patterns."""
    return pattern if isinstance(pattern, (NM, Unstructured)) else id(pattern)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the name of a linear in front of the message of a `ValueError` within."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_solution(method: LinearMethod, solution: object, weight: torch.Tensor) -> None:
    """Raise unless `solve`, which may be the user's own, returned a valid solution.

    Raises:
        TypeError: it returned no `Solution`.
        ValueError: a weight of another shape, dtype or device, or a `row_error` of another shape.
    """
    kind = type(method).__name__
    if not isinstance(solution, Solution):
        raise TypeError(f"method: expected {kind}.solve to return a Solution, got {type(solution).__name__}")
    found = solution.weight
    for what in ("shape", "dtype", "device"):
        if getattr(found, what, None) != getattr(weight, what):
            raise ValueError(
                f"{kind}.solve: expected a weight of {what} {getattr(weight, what)}, got {getattr(found, what, type(found).__name__)}"
            )
    row_error, rows = solution.row_error, len(weight)
    if row_error is not None and getattr(row_error, "shape", None) != (rows,):
        got = list(row_error.shape) if isinstance(row_error, torch.Tensor) else type(row_error).__name__
        raise ValueError(f"{kind}.solve: expected a row_error of shape [{rows}], got {got}")
