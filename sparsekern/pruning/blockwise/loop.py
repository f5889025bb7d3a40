"""The block-wise loop: gather statistics of a block's inputs, solve its linears, run it pruned to make the next block's inputs.

Each block first runs dense up to the inputs of its last linear, to gather the statistics. Nothing else of the model is run, and
nothing is run twice. Fused experts are solved a few at a time, see `experts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from ..._warnings import warnings_about
from ...methods import BlockMethod, Gram, LinearMethod, Magnitude, Solution
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
from .experts import ExpertStatistics, expert_bytes, experts_in, is_expert
from .feed_forward import FeedForwardRun, networks_of
from .statistics import SharedStatistics


class Memory(Protocol):
    """The statistics of earlier datasets."""

    def totals(self, index: int) -> Mapping[str, torch.Tensor]:
        """Return the totals of block `index`, empty where there are none."""


@dataclass
class _Solved:
    """What is solved of a block so far; see `BlockResult`."""

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: dict[str, LayerReport] = field(default_factory=dict)
    totals: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, linear: Linear, weight: torch.Tensor, layer: LayerReport) -> None:
        """Keep the result of one linear."""
        self.weights[linear.name], self.layers[linear.name] = weight, layer


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
                plain, experts = _parted(plan.linears)
                self.probe = probe(
                    context.model, plan.blocks, plain, batches[0], experts=experts_in(experts), to_the_end=to_the_end
                )
                _check_called(experts, self.probe)
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
        result = _Solved()
        run: FeedForwardRun | None = None
        shared: SharedStatistics | None = None
        if network is None or not isinstance(self.method, BlockMethod) or self.method.attention == "dense":
            run = self._start_run(index)
            shared, routed = self._gather(index, linears, run) if self.gathers else (None, None)
            self._solve_alone(alone, shared, routed, result)
        else:
            if alone:
                self._solve_alone(alone, *self._gather(index, alone), result)
            with _written_meanwhile(alone, result.weights):
                run = self._start_run(index)
                shared, _ = self._gather(index, together, run)
        if run is not None and shared is not None:
            self._solve_together(run, shared, result)
        if shared is not None and self.memory is not None:
            result.totals |= shared.totals()
        return BlockResult(result.weights, [result.layers[linear.name] for linear in linears], result.totals)

    def _start_run(self, index: int) -> FeedForwardRun | None:
        network = self.plan.network(index)
        if network is None or not isinstance(self.method, BlockMethod):
            return None
        return FeedForwardRun(network, self.method, self.plan, sum(batch.tokens for batch in self.context.batches))

    def _solve_alone(
        self, linears: Sequence[Linear], shared: SharedStatistics | None, routed: ExpertStatistics | None, result: _Solved
    ) -> None:
        if shared is None:
            for linear in linears:
                with self.context.clock.phase("solve"):
                    result.take(linear, *self._solve(linear, None, None))
            return
        self._solve_shared(linears, shared, result)
        if routed is not None:
            self._solve_experts(routed, result)

    def _solve_shared(self, linears: Sequence[Linear], shared: SharedStatistics, result: _Solved) -> None:
        for members, inputs in shared.groups:
            for linear in members:
                if linear in linears:
                    with self.context.clock.phase("solve"):
                        result.take(linear, *self._solve(linear, shared.of(linear, inputs), inputs))

    def _solve_experts(self, routed: ExpertStatistics, result: _Solved) -> None:
        """Solve the experts of a block, as many at a time as their statistics fit. Their totals are kept as they are solved."""
        groups = routed.groups(expert_bytes(next(self.context.model.parameters()).device))
        earlier = self.memory.totals(routed.index) if self.memory is not None else {}
        while True:
            with self.context.clock.phase("statistics"):
                group = next(groups, None)
            if group is None:
                break
            for linears, shared in group:
                if earlier:
                    shared.include(earlier)
                self._solve_expert(linears, shared, result)
                if self.memory is not None:
                    result.totals |= shared.totals()

    def _solve(
        self, linear: Linear, statistics: Statistic | None, inputs: InputStatistic | None, method: LinearMethod | None = None
    ) -> tuple[torch.Tensor, LayerReport]:
        start = self.context.clock.now()
        weight, pattern = linear.weight, self.plan.patterns[linear.name]
        method = self.method if method is None else method
        try:
            with warnings_about(linear.name), seeded(self.context.seed, linear.name):
                solution = method.solve(weight, statistics, pattern)
            _check_solution(method, solution, weight)
            zeros, relative_error = _outcome(weight, solution, inputs, pattern)
        except ValueError as error:
            raise ValueError(f"{linear.name}: {error}") from error
        seconds = self.context.clock.now() - start
        return solution.weight, LayerReport(linear.name, str(pattern), linear.shape, zeros, relative_error, seconds)

    def _solve_expert(self, linears: list[Linear], shared: SharedStatistics, result: _Solved) -> None:
        if shared.seen():
            for members, statistic in shared.groups:
                if statistic.tokens:  # otherwise only earlier datasets reached the expert
                    self._check_statistic(members, statistic)
            self._solve_shared(linears, shared, result)
            return
        for linear in linears:
            with self.context.clock.phase("solve"):
                result.take(linear, *self._solve(linear, None, None, Magnitude()))

    def _solve_together(self, run: FeedForwardRun, shared: SharedStatistics, result: _Solved) -> None:
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
        seconds = (clock.now() - start) / len(linears)
        for linear in linears:
            found = Solution(solved[linear.name])
            zeros, relative_error = _outcome(linear.weight, found, inputs[linear.name], self.plan.patterns[linear.name])
            whole = (solution.error, solution.alone) if linear.name == down else ()
            pattern = str(self.plan.patterns[linear.name])
            result.take(
                linear, found.weight, LayerReport(linear.name, pattern, linear.shape, zeros, relative_error, seconds, *whole)
            )

    def _gather(
        self, index: int, linears: Sequence[Linear], run: FeedForwardRun | None = None
    ) -> tuple[SharedStatistics, ExpertStatistics | None]:
        plain, matrices = _parted(linears)
        experts, kind = experts_in(matrices), (self.method.needs, self.plan.measure_error)
        shared = SharedStatistics(plain, *kind)
        routed = ExpertStatistics(index, matrices, *kind) if matrices else None
        inside = index < len(self.plan.blocks.modules)
        names = {linear.name for linear in plain} | {found.name for found in experts}
        order = [name for name in self.probe.calls[self.plan.blocks.block_name(index) if inside else OUTSIDE] if name in names]
        if inside:
            batches = self.activations.inputs_of(index, plain, order, experts)
        else:
            batches = self.activations.inputs_outside(plain, order, experts)
        while True:
            with self.context.clock.phase("forward"):
                step = next(batches, None)
            if step is None:
                break
            with self.context.clock.phase("statistics"):
                batch, inputs, calls = step
                shared.add(batch, inputs)
                if routed is not None:
                    routed.add(batch, calls)
                if run is not None:
                    run.add(batch, inputs[run.network.up.name])
        for members, statistic in shared.groups:
            self._check_statistic(members, statistic)
        if self.memory is not None and (earlier := self.memory.totals(index)):
            shared.include(earlier)
        return shared, routed

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


def _parted(linears: Sequence[Linear]) -> tuple[list[Linear], list[Linear]]:
    """Return the linears with modules of their own, and the matrices of fused experts."""
    return [linear for linear in linears if not is_expert(linear)], [linear for linear in linears if is_expert(linear)]


def _check_called(matrices: Sequence[Linear], probe: Probe) -> None:
    """Raise `ValueError` unless a forward called the modules of all fused experts, which is how their inputs are seen."""
    called = {name for names in probe.calls.values() for name in names}
    for experts in experts_in(matrices):
        if experts.name not in called:
            raise ValueError(
                f"model: a forward did not call {experts.name} ({type(experts.module).__name__}), so the inputs of its experts are "
                "unknown; leave them out with exclude"
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
