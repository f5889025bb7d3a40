"""The block-wise loop: gather statistics of a block's inputs, solve its linears, run it pruned to make the next block's inputs.

Each block first runs dense up to the inputs of its last linear, to gather the statistics. Nothing else of the model is run, and
nothing is run twice. Fused experts are solved a few at a time, see `experts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import Protocol

import torch
from torch import nn

from ..._warnings import warnings_about
from ...methods import BlockMethod, LinearMethod, Solution
from ...methods.allocation import UNIFORM
from ...models import Linear
from ...models.streaming import in_memory, lent_blocks, stream_of
from ...reports import LayerReport, Report
from ..allocation import allocatable, with_allocation
from ..batches import BY_POSITION, TOKENS, Batch
from ..corrections import DENSE, NONE
from ..plan import Plan, Request, check_finite, plan_linears
from ..run import BlockResult, Blocks, Loop, RunContext
from ..seeds import seeded
from ..session import batches_for, prepared
from ..windows import with_held_out
from .activations import Activations
from .course import Course
from .dealt_experts import DealtExperts
from .dense_stream import DenseStream
from .experts import ExpertStatistics, expert_bytes, parted
from .feed_forward import FeedForwardRun, networks_of
from .finished import blocks_on_disk, finished_blocks
from .gathering import Gathering
from .observation import observed
from .sequential import SequentialBlock
from .shares import LeafSums, Share
from .sharing import solve_shared
from .solving import Job, Solved, Solver, jobs_of
from .statistics import SharedStatistics
from .tuned import BlockTuner, restore_others, with_trainings
from .written import restored, write, written_meanwhile


class Memory(Protocol):
    """The statistics of earlier datasets."""

    def totals(self, index: int) -> Mapping[str, torch.Tensor]:
        """Return the totals of block `index`, empty where there are none."""


class BlockLoop(Loop[Plan, LinearMethod, Report, Blocks]):
    """The loop of `LinearMethod` and `BlockMethod`."""

    activations: Activations  # set by `run` where statistics are gathered
    share: Share  # of the batches, likewise
    last: int  # block that has linears to prune; set by `run`
    finished: set[int]  # blocks, which are restored; likewise
    dense: DenseStream | None = None  # the dense model's forwards, where targets are taken from it
    tuner: BlockTuner | None = None  # where blocks are tuned
    dealt_experts: DealtExperts | None = None  # of the current block, where experts are dealt to ranks

    def __init__(self, context: RunContext[Plan, LinearMethod, Report, Blocks], memory: Memory | None = None) -> None:
        """Make the loop.

        Args:
            context: the run.
            memory: earlier datasets, whose totals are added to the statistics and kept with each block; None for a single dataset.
        """
        super().__init__(context)
        self.memory = memory
        self.solver = Solver(self.method, self.plan, context.seed, context.clock, context.world)
        self.corrects = self.plan.correction != NONE
        self.gathers = self.method.needs is not None or self.plan.measure_error or self.corrects

    @classmethod
    def make_plan(cls, model: nn.Module, method: LinearMethod, request: Request) -> tuple[Plan, list[Batch] | None]:
        plan = replace(plan_linears(model, method, request), correction=request.correction, tune=request.tune)
        plan = replace(plan, measure_error=request.report_error, distill=request.distill)
        trainings = [config for config in (request.tune, request.distill) if config is not None]
        asked = request.report_error or request.correction != NONE or request.allocation != UNIFORM or trainings
        if not method.needs_data and not asked:
            request.rules.check_unweighted(method)
            return plan, None
        plan = plan.calibrated(request.rules)
        most_tokens = min((max(1, config.batch_tokens // request.leaves) for config in trainings), default=None)
        batches = batches_for(model, method, request.calibration, request.batch_size, most_tokens)
        if request.correction == DENSE or trainings:
            batches = with_held_out(batches, request.seed)
        with prepared(model, request.seed), lent_blocks(model):
            plan = observed(model, plan, batches)
            plan = with_trainings(model, plan, batches, request.optional)
            if request.allocation != UNIFORM:
                plan = allocatable(model, plan, request.allocation, request.optional)
            if isinstance(method, BlockMethod):
                plan = replace(plan, networks=tuple(networks_of(model, plan, batches[0], method)))
        return plan, batches

    @classmethod
    def finished_plan(cls, model: nn.Module, plan: Plan, batches: list[Batch] | None, request: Request) -> Plan:
        if plan.allocation == UNIFORM:
            return plan
        with prepared(model, request.seed):
            return with_allocation(model, plan, batches or [], request)

    @property
    def course(self) -> Course:
        """The course of the forwards, which the plan holds where statistics are gathered."""
        assert self.plan.course is not None
        return self.plan.course

    def run(self) -> None:
        context, parts = self.context, self.plan.parts
        order = [*self.course.order, len(parts) - 1] if self.plan.course is not None else list(range(len(parts)))
        planned = [index for index in order if parts[index]]
        self.last, self.finished = planned[-1], finished_blocks(context.checkpoint, planned)
        batches = context.batches
        if len(self.finished) == len(planned) or not (self.gathers or self.plan.tune):
            batches = []  # no hidden states are needed
        if batches:
            with context.clock.phase("capture"):
                self.share = Share(context.world, batches, context.leaves)
                streams = 2 if self.plan.needs_dense_stream else 1
                shelf = context.memory.shelf(context.model, streams)
                self.activations = Activations(context.model, self.share.batches, self.course, shelf)
                if self.plan.needs_dense_stream:
                    shelf = context.memory.shelf(context.model, streams)
                    self.dense = DenseStream(context.model, self.share.batches, self.course, shelf)
                if self.dense is not None and self.plan.tune is not None:
                    self.tuner = BlockTuner(context, self.plan.tune, self.share, self.activations, self.course, self.dense)
        with blocks_on_disk(context.checkpoint, context.clock):
            self._run_blocks(order, bool(batches))
        self.solver.say_unseen()

    def _run_blocks(self, order: Sequence[int], forwards: bool) -> None:
        context, parts = self.context, self.plan.parts
        for index in order:
            if not parts[index] and not forwards:
                continue
            if self.dense is not None and context.checkpoint and index in self.finished:
                with context.clock.phase("forward"):
                    self.dense.advance_finished(index, context.checkpoint, context.world.check)
            with in_memory(context.model, index):
                if self.dense is not None:
                    self.dense.keep(parts[index])
                if linears := parts[index]:
                    if context.checkpoint and index in self.finished:
                        self._restore(index, linears, context.checkpoint)
                    else:
                        self._prune_block(index, linears)
                if index == self.last:
                    break
                if forwards:
                    with context.clock.phase("forward"):
                        if self.dense is not None:
                            self.dense.advance(index, context.world.check)
                        self.activations.advance(index, context.world.check)

    def _restore(self, index: int, linears: Sequence[Linear], checkpoint: Blocks) -> None:
        found = checkpoint.load(index, linears)
        assert found is not None  # since it is finished
        if self.dense is not None and index < len(self.plan.blocks.modules):
            with self.context.clock.phase("forward"):
                self.dense.advance(index, self.context.world.check)  # while the block is dense
        if found.tuning is not None:
            if stream_of(self.context.model) is None:  # otherwise they were read with the block
                restore_others(self.plan, index, linears, found.others)
            self.context.report.tuning.append(found.tuning)
        write(linears, found.weights)
        if self.tuner is not None and found.tuning is not None:
            self.tuner.settle(index)
        self.context.report.resumed_blocks += 1
        self.context.record(found.layers)

    def _prune_block(self, index: int, linears: Sequence[Linear]) -> None:
        for linear in linears if stream_of(self.context.model) else ():
            check_finite(linear)
        result = self.solve_block(index, linears)
        tuner = self.tuner if index < len(self.plan.blocks.modules) else None
        with nullcontext(result) if tuner is None else tuner.tuned(index, linears, result) as result:
            if self.dense is not None and index != self.last:
                with self.context.clock.phase("forward"):  # lends the block other weights, while `save` may write its own
                    self.dense.advance(index, self.context.world.check)
            if self.context.checkpoint:
                with self.context.clock.phase("write"):
                    self.context.checkpoint.save(index, result)
            self.context.world.agree(f"block {index}")
        write(linears, result.weights)
        self.context.record(result.layers)
        if result.tuning is not None:
            self.context.report.tuning.append(result.tuning)

    def solve_block(self, index: int, linears: Sequence[Linear]) -> BlockResult:
        """Return the result of block `index`, or of the linears outside the blocks. The model is unchanged, unless it is streamed."""
        if self.corrects:
            return self._solve_in_stages(index, linears)
        network = self.plan.network(index)
        together = network.linears if network else ()
        alone = [linear for linear in linears if linear not in together]
        result = Solved(in_place=stream_of(self.context.model) is not None and self.memory is None)
        run: FeedForwardRun | None = None
        shared: SharedStatistics | None = None
        if network is None or not isinstance(self.method, BlockMethod) or self.method.attention == "dense":
            run = self._start_run(index)
            shared, routed = self._gather(index, linears, run) if self.gathers else (None, None)
            self._solve_alone(alone, shared, routed, result)
        else:
            if alone:
                self._solve_alone(alone, *self._gather(index, alone), result)
            with written_meanwhile(alone, result.weights):
                run = self._start_run(index)
                shared, _ = self._gather(index, together, run)
        if run is not None and shared is not None:
            self._solve_together(run, shared, result)
        if shared is not None and self.memory is not None:
            result.totals |= shared.totals()
        self.solver.say_lost_zeros(linears, result)
        return BlockResult(result.weights, [result.layers[linear.name] for linear in linears], result.totals)

    def _solve_in_stages(self, index: int, linears: Sequence[Linear]) -> BlockResult:
        """Return the result of a block whose linears are solved one after another, the experts last, all at once."""
        context = self.context
        streamed = stream_of(context.model) is not None
        plain, experts = parted(linears)
        listed = [linear for linear in plain if linear.name in self.plan.listed]
        alone = [linear for linear in plain if linear.name not in self.plan.listed]
        result = Solved(in_place=streamed)
        with nullcontext() if streamed else restored(alone):
            SequentialBlock(index, context, self.solver, self.share, self.activations, self.course, self.dense).solve(alone, result)
            if last := [*listed, *experts]:
                gathers = self.method.needs is not None or self.plan.measure_error
                shared, routed = self._gather(index, last) if gathers else (None, None)
                self._solve_alone(last, shared, routed, result)
        self.solver.say_lost_zeros(linears, result)
        return BlockResult(result.weights, [result.layers[linear.name] for linear in linears], result.totals)

    def _start_run(self, index: int) -> FeedForwardRun | None:
        network = self.plan.network(index)
        if network is None or not isinstance(self.method, BlockMethod):
            return None
        mask = self.course.masks(network.up.name, index)[0]
        tokens = sum(batch.tokens for batch in self.share.batches) if (mask or "").removesuffix(BY_POSITION) == TOKENS else 0
        return FeedForwardRun(network, self.method, self.plan, self.share, tokens, mask)

    def _solve_alone(
        self, linears: Sequence[Linear], shared: SharedStatistics | None, routed: ExpertStatistics | None, result: Solved
    ) -> None:
        if shared is None:
            for linear in linears:
                self.solver.solve(Job(linear), result)
            return
        jobs, unseen = jobs_of(shared)
        jobs = [job for job in jobs if job.linear in linears]
        solve_shared(self.solver, self.context.world, self.context.leaves, jobs, result)
        self._solve_unseen([linear for linear in unseen if linear in linears], result)
        if routed is not None:
            self._solve_experts(routed, result)

    def _solve_experts(self, routed: ExpertStatistics, result: Solved) -> None:
        """Solve the experts of a block, as many at a time as their statistics fit. Their totals are kept as they are solved."""
        if self.dealt_experts is not None:
            self._solve_dealt_experts(self.dealt_experts, result)
            self._solve_unseen(routed.unseen(), result)
            return
        groups = routed.groups(self._expert_bytes())
        while True:
            with self.context.clock.phase("statistics"):
                group = next(groups, None)
            if group is None:
                break
            self._solve_group(group, result)
            group.clear()  # before the statistics of the next are made

    def _expert_bytes(self) -> int:
        return expert_bytes(next(self.context.model.parameters()).device, self.context.memory.experts)

    def _solve_dealt_experts(self, dealt: DealtExperts, result: Solved) -> None:
        """Solve the experts of a block that are dealt to this rank, pack by pack, and receive those of the others."""
        context = self.context
        packs = dealt.packs(context.leaves)
        for turn in zip_longest(*packs):
            with context.clock.phase("statistics"):
                group = dealt.statistics(turn)
            self._solve_group(group, result)
            group.clear()
        with context.clock.phase("exchange"):
            dealt.pass_on(packs, result)

    def _solve_group(self, group: Sequence[SharedStatistics], result: Solved) -> None:
        jobs: list[Job] = []
        for shared in group:
            found, unseen = jobs_of(shared)
            jobs += found
            for members, inputs in shared.groups:
                if inputs.tokens:  # otherwise no token of this dataset reached the expert
                    self.solver.check_statistic(members, inputs)
            self._solve_unseen(unseen, result)
            if self.memory is not None:
                result.totals |= shared.totals()
        self.solver.solve_many(jobs, result)

    def _solve_unseen(self, linears: Sequence[Linear], result: Solved) -> None:
        if self.method.needs is not None:
            self.solver.solve_unseen(linears, result)
        else:
            for linear in linears:  # only their errors are not known
                self.solver.solve(Job(linear), result)

    def _solve_together(self, run: FeedForwardRun, shared: SharedStatistics, result: Solved) -> None:
        linears, down = run.network.linears, run.network.down.name
        inputs = {linear.name: statistic for members, statistic in shared.groups for linear in members}
        clock = self.context.clock
        start = clock.now()
        with clock.phase("solve"):
            try:
                with warnings_about(down), seeded(self.context.seed, down):
                    solved, solution = run.solve(inputs)
            except ValueError as error:
                if self.context.world.has_raised(error):
                    raise
                raise ValueError(f"{', '.join(linear.name for linear in linears)}: {error}") from error
        seconds = (clock.now() - start) / len(linears)
        for linear in linears:
            found = Solution(solved[linear.name])
            zeros, relative_error = self.solver.outcome(linear, found, inputs[linear.name])
            whole = (solution.error, solution.alone) if linear.name == down else ()
            pattern = str(self.plan.patterns[linear.name])
            result.take(
                linear, found.weight, LayerReport(linear.name, pattern, linear.shape, zeros, relative_error, seconds, *whole)
            )

    def _gather(
        self, index: int, linears: Sequence[Linear], run: FeedForwardRun | None = None
    ) -> tuple[SharedStatistics, ExpertStatistics | None]:
        gathering, kind = Gathering(self.plan, index, linears), (self.method.needs, self.plan.measure_error)
        summed = LeafSums(lambda: SharedStatistics(gathering.plain, *kind, gathering.recorded_masks), self.share)
        shelf, by_routing = self.activations.shelf, self.plan.by_routing
        routed: ExpertStatistics | None = None
        if gathering.matrices:
            masks = gathering.masks
            routed = ExpertStatistics(gathering.matrices, *kind, routing_weights=by_routing, masks=masks, shelf=shelf)
        batches = gathering.inputs(self.activations)
        while True:
            self.context.world.check()
            with self.context.clock.phase("forward"):
                step = next(batches, None)
            if step is None:
                break
            with self.context.clock.phase("statistics"):
                batch, inputs, calls = step
                summed.of(batch).add(batch, inputs)
                if routed is not None:
                    routed.add(batch, calls)
                if run is not None:
                    run.add(batch, inputs[run.network.up.name])
        with self.context.clock.phase("exchange" if self.context.world.size > 1 else "statistics"):
            shared = summed.result()
        self.dealt_experts = None
        if routed is not None and self.context.leaves > 1:
            self.dealt_experts = DealtExperts(routed, self.context.world, self.context.batches, self._expert_bytes())
        for members, statistic in shared.groups:
            if statistic.tokens:
                self.solver.check_statistic(members, statistic)
        if self.memory is not None and (earlier := self.memory.totals(index)):
            shared.include(earlier)
            if routed is not None:
                routed.include(earlier)
        unseen = shared.unseen()
        if run is not None and (missed := [linear.name for linear in unseen if linear in run.network.linears]):
            raise ValueError(f"{missed[0]}: no calibration token reached it; calibrate with more text or leave it out with exclude")
        if self.method.needs is not None:
            self.solver.refuse_unseen([*unseen, *(routed.unseen() if routed else [])])
        return shared, routed
