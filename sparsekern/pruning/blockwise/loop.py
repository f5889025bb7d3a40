"""One block at a time: gather statistics of its inputs, solve its linears, go on with what it makes.

For each block: run it dense up to the inputs of its last linear and gather statistics; solve its linears; run it pruned to make the
inputs of the next block. Nothing else of the model is run, and nothing that is run is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ...methods import Method, Solution
from ...methods.base import StatisticKind
from ...models import FeedForward, Linear
from ...pattern import Pattern
from ...reports.report import LayerReport, Report
from ..batches import Batch
from ..checkpoint import Checkpoint
from ..plan import Plan
from ..progress import Clock, Notices, Progress, warnings_named
from ..seeds import seeded
from .activations import OUTSIDE, Activations, probe
from .feed_forward import FeedForwardRun
from .statistics import FeatureNorm, Gram, Sensitivity, SharedStatistics


class BlockRun:
    """One call of `prune`, everything being checked."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        networks: list[FeedForward | None] | None,
        method: Method,
        kind: StatisticKind | None,
        batches: list[Batch] | None,
        checkpoint: Checkpoint | None,
        report: Report,
        bar: Progress,
        clock: Clock,
    ) -> None:
        self.model, self.plan, self.networks = model, plan, networks
        self.method, self.kind, self.batches = method, kind, batches
        self.checkpoint, self.report, self.bar, self.clock = checkpoint, report, bar, clock
        self.notices, self.seed = Notices(), torch.initial_seed()

    def prune_all(self) -> None:
        blocks, outside = self.plan.blocks, self.plan.outside_linears
        parts = (*self.plan.block_linears, outside)
        planned = [index for index, linears in enumerate(parts) if linears]
        batches = self.batches
        if self.checkpoint and all(map(self.checkpoint.holds, planned)):
            batches = None  # nothing is left to solve, so no hidden states are needed
        if batches:
            with self.clock.phase("capture"):
                self.probe = probe(self.model, blocks, self.plan.linears, batches[0], to_the_end=bool(outside))
                self.activations = Activations(self.model, blocks, batches, self.probe.returns_tuple)
        resuming = True
        for index, linears in enumerate(parts):
            if linears:
                resuming = resuming and self._restore(index, linears)
                if not resuming:
                    self._prune_block(index, linears)
            if batches and index < planned[-1]:
                with self.clock.phase("forward"):
                    self.activations.advance(index)

    def _restore(self, index: int, linears: Sequence[Linear]) -> bool:
        found = self.checkpoint.load(index, linears) if self.checkpoint else None
        if found is None:
            return False
        weights, layers = found
        self._write(linears, weights)
        self.report.resumed_blocks += 1
        self._record(layers)
        return True

    def _prune_block(self, index: int, linears: Sequence[Linear]) -> None:
        network = self.networks[index] if self.networks and index < len(self.networks) else None
        together = network.linears if network else ()
        alone = [linear for linear in linears if linear not in together]
        weights: dict[str, torch.Tensor] = {}
        layers: dict[str, LayerReport] = {}
        if network is None or self.method.attention == "dense":
            run = self._start_run(network)
            shared = self._gather(index, linears, run) if self.kind else None
            self._solve_alone(alone, shared, weights, layers)
        else:
            if alone:
                self._solve_alone(alone, self._gather(index, alone), weights, layers)
            with self._written_meanwhile(alone, weights):
                run = self._start_run(network)
                shared = self._gather(index, together, run)
        if run is not None:
            self._solve_together(run, shared, weights, layers)
        ordered = [layers[linear.name] for linear in linears]
        if self.checkpoint:
            with self.clock.phase("write"):
                self.checkpoint.save(index, weights, ordered)
        self._write(linears, weights)
        self._record(ordered)

    def _solve_alone(
        self,
        linears: Sequence[Linear],
        shared: SharedStatistics | None,
        weights: dict[str, torch.Tensor],
        layers: dict[str, LayerReport],
    ) -> None:
        groups = shared.groups if shared else [(linears, None)]
        for members, statistic in groups:
            for linear in members:
                if linear in linears:
                    with self.clock.phase("solve"):
                        statistics = shared.of(linear, statistic) if shared else None
                        weights[linear.name], layers[linear.name] = self._solve(linear, statistics)

    def _start_run(self, network: FeedForward | None) -> FeedForwardRun | None:
        return None if network is None else FeedForwardRun(network, self.plan, sum(batch.tokens for batch in self.batches))

    def _solve_together(
        self, run: FeedForwardRun, shared: SharedStatistics, weights: dict[str, torch.Tensor], layers: dict[str, LayerReport]
    ) -> None:
        linears = run.network.linears
        statistics = {linear.name: statistic for members, statistic in shared.groups for linear in members}
        start = self.clock.now()
        with self.clock.phase("solve"):
            try:
                with warnings_named(run.network.down.name), seeded(self.seed, run.network.down.name):
                    solved, solution = run.solve(self.method, statistics)
            except ValueError as error:
                raise ValueError(f"{', '.join(linear.name for linear in linears)}: {error}") from error
        weights |= solved
        seconds = (self.clock.now() - start) / len(linears)
        for linear in linears:
            found = Solution(solved[linear.name], solved[linear.name] != 0)
            zeros, error = _outcome(linear.weight, found, statistics[linear.name])
            whole = (solution.error, solution.alone) if linear is run.network.down else ()
            pattern, shape = str(self.plan.patterns[linear.name]), tuple(linear.weight.shape)
            layers[linear.name] = LayerReport(linear.name, pattern, shape, zeros, error, seconds, *whole)

    @contextmanager
    def _written_meanwhile(self, linears: Sequence[Linear], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The block with new weights for `linears`; as it was afterwards, so that a failure leaves it unchanged."""
        dense = {linear.name: linear.weight.clone() for linear in linears}
        self._write(linears, weights)
        try:
            yield
        finally:
            self._write(linears, dense)

    def _gather(self, index: int, linears: Sequence[Linear], run: FeedForwardRun | None = None) -> SharedStatistics:
        shared = SharedStatistics(linears, self.kind, self.method.sensitivity)
        names = {linear.name for linear in linears}
        if index < len(self.plan.blocks.modules):
            order = self.probe.calls[self.plan.blocks.block_name(index)]
            batches = self.activations.inputs_of(index, linears, [name for name in order if name in names])
        else:
            batches = self.activations.inputs_outside(linears, self.probe.calls[OUTSIDE])
        while True:
            with self.clock.phase("forward"):
                step = next(batches, None)
            if step is None:
                break
            with self.clock.phase("statistics"):
                shared.add(*step)
                if run is not None:
                    run.add(step[0], step[1][run.network.up.name])
        for members, statistic in shared.groups:
            self._check_statistic(members, statistic)
        return shared

    def _check_statistic(self, members: Sequence[Linear], statistic: FeatureNorm | Gram) -> None:
        name, features = members[0].name, members[0].features
        if not statistic.tokens:
            raise ValueError(f"{name}: no calibration token reached it; calibrate with more text or leave it out with exclude")
        if self.method.statistic == "gram":
            self.notices.few_tokens(name, statistic.tokens, features)
        if dead := int((statistic.sum_squares == 0).sum()):
            self.notices.once(
                "dead features",
                f"{name}: {dead} of {features} input features were never active in calibration; their weights are pruned first",
            )

    def _solve(self, linear: Linear, statistic: FeatureNorm | Gram | Sensitivity | None) -> tuple[torch.Tensor, LayerReport]:
        start = self.clock.now()
        weight, pattern = linear.weight, self.plan.patterns[linear.name]
        try:
            with warnings_named(linear.name), seeded(self.seed, linear.name):
                solution = self._solution(linear, statistic, pattern)
        except ValueError as error:
            raise ValueError(f"{linear.name}: {error}") from error
        zeros, error = _outcome(weight, solution, statistic)
        seconds = self.clock.now() - start
        return solution.weight, LayerReport(linear.name, str(pattern), tuple(weight.shape), zeros, error, seconds)

    def _solution(self, linear: Linear, statistic: FeatureNorm | Gram | Sensitivity | None, pattern: Pattern) -> Solution:
        return self.method.solve(linear.weight, statistic, pattern)

    def _write(self, linears: Sequence[Linear], weights: Mapping[str, torch.Tensor]) -> None:
        for linear in linears:
            linear.weight.copy_(weights[linear.name])

    def _record(self, layers: Sequence[LayerReport]) -> None:
        for layer in layers:
            self.report.layers.append(layer)
            self.bar.layer_done(layer)


def _outcome(
    weight: torch.Tensor, solution: Solution, statistic: FeatureNorm | Gram | Sensitivity | None
) -> tuple[int, float | None]:
    """How many zeros there are, and the relative error where it is known: one read from the device a linear."""
    found = [(solution.weight == 0).sum().double()]
    if isinstance(statistic, Sensitivity):
        statistic = statistic.inputs
    if isinstance(statistic, Gram):
        row_error = solution.row_error
        if row_error is None:
            row_error = statistic.row_energy(solution.weight.float() - weight.float())
        found += [row_error.double().sum(), statistic.row_energy(weight).sum()]
    zeros, *figures = torch.stack(found).tolist()
    if not figures:
        return int(zeros), None
    error, energy = figures
    return int(zeros), error / energy if energy else 0.0
