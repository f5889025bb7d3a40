"""The block-wise loop: gather statistics of a block's inputs, solve its linears, run it pruned to make the next block's inputs.

Each block first runs dense up to the inputs of its last linear, to gather the statistics. Nothing else of the model is run, and
nothing is run twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from ..._warnings import warnings_about
from ...methods import BlockMethod, Gram, LinearMethod, Solution
from ...methods.statistics import InputStatistic, Statistic, inputs_of
from ...models import Linear
from ...pattern import NM, Pattern
from ...reports import LayerReport, Report
from ..batches import Batch
from ..plan import Plan, Request, plan_linears
from ..progress import Notices
from ..run import BlockResult, Blocks, Loop, RunContext
from ..seeds import seeded
from ..session import batches_for, prepared
from ..store import has_zeros_of
from .activations import OUTSIDE, Activations, Probe, probe
from .feed_forward import FeedForwardRun, networks_of
from .statistics import SharedStatistics


class Memory(Protocol):
    """The statistics of earlier datasets."""

    def totals(self, index: int) -> Mapping[str, torch.Tensor]:
        """Return the totals of block `index`, empty where there are none."""


class BlockLoop(Loop[Plan, LinearMethod, Report, Blocks]):
    """The loop of `LinearMethod` and `BlockMethod`."""

    probe: Probe  # both are set by `run` where statistics are gathered
    activations: Activations

    def __init__(self, context: RunContext[Plan, LinearMethod, Report, Blocks], memory: Memory | None = None) -> None:
        """Make the loop.

        Args:
            context: the run.
            memory: earlier datasets, whose totals are added to the statistics and kept with each block; None for a single dataset.
        """
        super().__init__(context)
        self.memory, self.notices = memory, Notices()
        self.gathers = self.method.needs is not None or self.plan.measure_error

    @classmethod
    def make_plan(cls, model: nn.Module, method: LinearMethod, request: Request) -> tuple[Plan, list[Batch] | None]:
        plan = replace(plan_linears(model, method, request), measure_error=request.report_error)
        if not method.needs_data and not request.report_error:
            return plan, None
        batches = batches_for(model, method, request.calibration, request.batch_size)
        if isinstance(method, BlockMethod):
            with prepared(model, request.seed):
                plan = replace(plan, networks=tuple(networks_of(model, plan, batches[0], method)))
        return plan, batches

    def run(self) -> None:
        context, plan, parts = self.context, self.plan, self.plan.parts
        planned = [index for index, linears in enumerate(parts) if linears]
        batches = context.batches
        if context.checkpoint and all(map(context.checkpoint.holds, planned)):
            batches = []  # no block is left to solve, so no hidden states are needed
        if batches:
            with context.clock.phase("capture"):
                to_the_end = bool(plan.outside_linears)
                self.probe = probe(context.model, plan.blocks, plan.linears, batches[0], to_the_end=to_the_end)
                self.activations = Activations(context.model, plan.blocks, batches, self.probe.returns_tuple)
        resuming = True
        for index, linears in enumerate(parts):
            if linears:
                resuming = resuming and self._restore(index, linears)
                if not resuming:
                    self._prune_block(index, linears)
            if batches and index < planned[-1]:
                with context.clock.phase("forward"):
                    self.activations.advance(index)

    def _restore(self, index: int, linears: Sequence[Linear]) -> bool:
        found = self.context.checkpoint.load(index, linears) if self.context.checkpoint else None
        if found is None:
            return False
        _write(linears, found.weights)
        self.context.report.resumed_blocks += 1
        self.context.record(found.layers)
        return True

    def _prune_block(self, index: int, linears: Sequence[Linear]) -> None:
        result = self.solve_block(index, linears)
        if self.context.checkpoint:
            with self.context.clock.phase("write"):
                self.context.checkpoint.save(index, result)
        _write(linears, result.weights)
        self.context.record(result.layers)

    def solve_block(self, index: int, linears: Sequence[Linear]) -> BlockResult:
        """Return the result of block `index`, or of the linears outside the blocks. The model is unchanged."""
        network = self.plan.network(index)
        together = network.linears if network else ()
        alone = [linear for linear in linears if linear not in together]
        weights: dict[str, torch.Tensor] = {}
        layers: dict[str, LayerReport] = {}
        run: FeedForwardRun | None = None
        shared: SharedStatistics | None = None
        if network is None or not isinstance(self.method, BlockMethod) or self.method.attention == "dense":
            run = self._start_run(index)
            shared = self._gather(index, linears, run) if self.gathers else None
            self._solve_alone(alone, shared, weights, layers)
        else:
            if alone:
                self._solve_alone(alone, self._gather(index, alone), weights, layers)
            with _written_meanwhile(alone, weights):
                run = self._start_run(index)
                shared = self._gather(index, together, run)
        if run is not None and shared is not None:
            self._solve_together(run, shared, weights, layers)
        totals = shared.totals() if shared is not None and self.memory is not None else {}
        return BlockResult(weights, [layers[linear.name] for linear in linears], totals)

    def _start_run(self, index: int) -> FeedForwardRun | None:
        network = self.plan.network(index)
        if network is None or not isinstance(self.method, BlockMethod):
            return None
        return FeedForwardRun(network, self.method, self.plan, sum(batch.tokens for batch in self.context.batches))

    def _solve_alone(
        self,
        linears: Sequence[Linear],
        shared: SharedStatistics | None,
        weights: dict[str, torch.Tensor],
        layers: dict[str, LayerReport],
    ) -> None:
        if shared is None:
            for linear in linears:
                with self.context.clock.phase("solve"):
                    weights[linear.name], layers[linear.name] = self._solve(linear, None, None)
            return
        for members, inputs in shared.groups:
            for linear in members:
                if linear in linears:
                    with self.context.clock.phase("solve"):
                        statistics = shared.of(linear, inputs)
                        weights[linear.name], layers[linear.name] = self._solve(linear, statistics, inputs)

    def _solve(
        self, linear: Linear, statistics: Statistic | None, inputs: InputStatistic | None
    ) -> tuple[torch.Tensor, LayerReport]:
        start = self.context.clock.now()
        weight, pattern = linear.weight, self.plan.patterns[linear.name]
        try:
            with warnings_about(linear.name), seeded(self.context.seed, linear.name):
                solution = self.method.solve(weight, statistics, pattern)
            _check_solution(self.method, solution, weight)
            zeros, relative_error = _outcome(weight, solution, inputs, pattern)
        except ValueError as error:
            raise ValueError(f"{linear.name}: {error}") from error
        seconds = self.context.clock.now() - start
        return solution.weight, LayerReport(linear.name, str(pattern), linear.shape, zeros, relative_error, seconds)

    def _solve_together(
        self, run: FeedForwardRun, shared: SharedStatistics, weights: dict[str, torch.Tensor], layers: dict[str, LayerReport]
    ) -> None:
        linears, down = run.network.linears, run.network.down.name
        inputs = {linear.name: statistic for members, statistic in shared.groups for linear in members}
        clock = self.context.clock
        start = clock.now()
        with clock.phase("solve"):
            try:
                with warnings_about(down), seeded(self.context.seed, down):
                    solved, solution = run.solve(inputs)
            except ValueError as error:
                raise ValueError(f"{', '.join(linear.name for linear in linears)}: {error}") from error
        weights |= solved
        seconds = (clock.now() - start) / len(linears)
        for linear in linears:
            found = Solution(solved[linear.name])
            zeros, relative_error = _outcome(linear.weight, found, inputs[linear.name], self.plan.patterns[linear.name])
            whole = (solution.error, solution.alone) if linear.name == down else ()
            pattern = str(self.plan.patterns[linear.name])
            layers[linear.name] = LayerReport(linear.name, pattern, linear.shape, zeros, relative_error, seconds, *whole)

    def _gather(self, index: int, linears: Sequence[Linear], run: FeedForwardRun | None = None) -> SharedStatistics:
        shared = SharedStatistics(linears, self.method.needs, self.plan.measure_error)
        names = {linear.name for linear in linears}
        if index < len(self.plan.blocks.modules):
            order = self.probe.calls[self.plan.blocks.block_name(index)]
            batches = self.activations.inputs_of(index, linears, [name for name in order if name in names])
        else:
            batches = self.activations.inputs_outside(linears, self.probe.calls[OUTSIDE])
        while True:
            with self.context.clock.phase("forward"):
                step = next(batches, None)
            if step is None:
                break
            with self.context.clock.phase("statistics"):
                shared.add(*step)
                if run is not None:
                    run.add(step[0], step[1][run.network.up.name])
        for members, statistic in shared.groups:
            self._check_statistic(members, statistic)
        if self.memory is not None and (earlier := self.memory.totals(index)):
            shared.include(earlier)
        return shared

    def _check_statistic(self, members: Sequence[Linear], statistic: InputStatistic) -> None:
        name, features = members[0].name, members[0].features
        if not statistic.tokens:
            raise ValueError(f"{name}: no calibration token reached it; calibrate with more text or leave it out with exclude")
        if self.method.needs is not None and inputs_of(self.method.needs) is Gram:
            self.notices.few_tokens(name, statistic.tokens, features)
        if dead := int((statistic.sum_squares == 0).sum()):
            self.notices.once(
                "dead features",
                f"{name}: {dead} of {features} input features were never active in calibration; their weights are pruned first",
            )


def _check_solution(method: LinearMethod, solution: object, weight: torch.Tensor) -> None:
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


@contextmanager
def _written_meanwhile(linears: Sequence[Linear], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give `linears` new weights within, and restore their own afterwards, so that a failure leaves the block unchanged."""
    dense = {linear.name: linear.weight.clone() for linear in linears}
    _write(linears, weights)
    try:
        yield
    finally:
        _write(linears, dense)


def _write(linears: Sequence[Linear], weights: Mapping[str, torch.Tensor]) -> None:
    for linear in linears:
        linear.weight.copy_(weights[linear.name])


def _outcome(weight: torch.Tensor, solution: Solution, inputs: InputStatistic | None, pattern: Pattern) -> tuple[int, float | None]:
    """Return the number of zeros, and the relative error if it is known. The device is read once for each linear.

    Raises:
        ValueError: the solution is not pruned to `pattern`.
    """
    found = [(solution.weight == 0).sum().double(), _groups_over(solution.weight, pattern).double()]
    if isinstance(inputs, Gram):
        row_error = solution.row_error
        if row_error is None:
            row_error = inputs.row_energy(solution.weight.float() - weight.float())
        found += [row_error.double().sum(), inputs.row_energy(weight).sum()]
    zeros, over, *figures = torch.stack(found).tolist()
    if over or not has_zeros_of(pattern, solution.weight.shape, int(zeros)):
        raise ValueError(f"expected a solution pruned to {pattern}, got {int(zeros):,} zeros of {weight.numel():,} weights")
    if not figures:
        return int(zeros), None
    error, energy = figures
    return int(zeros), error / energy if energy else 0.0


def _groups_over(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Return how many groups of an N:M pattern hold more than N non-zeros, as a tensor on the weight's device."""
    if not isinstance(pattern, NM):
        return weight.new_zeros(())
    return ((weight != 0).reshape(len(weight), -1, pattern.m).sum(-1) > pattern.n).sum()
