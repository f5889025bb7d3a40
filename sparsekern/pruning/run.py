"""One pruning run: the context of a loop, the result of a block, and the base class of all loops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar, cast

import torch
from torch import nn

from ..methods import Method
from ..models import Linear
from ..ranks import World
from ..reports import ExpertReport, LayerReport, MixtureReport, RemovalReport, Report, SubLayerReport
from .batches import Batch
from .host_memory import freed_memory_kept, freed_memory_returned
from .memory import Memory
from .plan import Request
from .progress import Clock, Progress
from .session import prepared


class PlanLike(Protocol):
    """The checked plan of what to prune."""

    @property
    def steps(self) -> int:
        """The number of layers to report."""

    @property
    def settings(self) -> dict[str, object]:
        """The settings of the result besides method, seed, calibration and model, as values that JSON can hold."""


@dataclass(frozen=True)
class BlockResult:
    """The result of one block.

    Attributes:
        weights: the pruned weights, by linear name.
        layers: a report of each layer.
        totals: the sums over datasets, see `SharedStatistics.totals`; empty where none are kept.
        others: the parameters that tuning changed besides the weights, by name.
        tuning: the entry of `Report.tuning`; None where the block was not tuned.
    """

    weights: Mapping[str, torch.Tensor]
    layers: Sequence[LayerReport] | Sequence[SubLayerReport] | Sequence[MixtureReport]
    totals: Mapping[str, torch.Tensor] = field(default_factory=dict)
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tuning: dict[str, float] | None = None


class Blocks(Protocol):
    """A store of the finished blocks of a run."""

    def save(self, index: int, result: BlockResult) -> None:
        """Keep the result of block `index`."""

    def holds(self, index: int) -> bool:
        """Return whether block `index` is finished."""

    def load(self, index: int, linears: Sequence[Linear]) -> BlockResult | None:
        """Return the result of block `index`, or None where it is not finished."""

    def finish(self) -> None:
        """Wait until all results are on disk."""

    def as_before(self, index: int) -> AbstractContextManager[object]:
        """Let the model read block `index` within as it was in front of the run. A block in memory is left alone."""

    def put_back(self, index: int) -> None:
        """Let the model read finished block `index` as `as_before` does, until it is pruned again."""


PlanT = TypeVar("PlanT", bound=PlanLike)
MethodT = TypeVar("MethodT", bound=Method)
ReportT = TypeVar("ReportT", bound=Report | RemovalReport | ExpertReport)
BlocksT = TypeVar("BlocksT")


@dataclass(frozen=True)
class RunContext(Generic[PlanT, MethodT, ReportT, BlocksT]):
    """Everything that a loop is given.

    Attributes:
        model: the model, ready to run: in evaluation mode, without gradients.
        plan: what to prune.
        method: the method's config.
        batches: the calibration data; empty for a method without.
        seed: the seed of all random numbers.
        checkpoint: the store of finished blocks; None keeps none.
        report: collects the report of each layer.
        progress: the bar.
        clock: seconds by phase.
        world: the processes that prune together.
        leaves: the number of parts that statistics are summed in, see `prune`.
        memory: the limits of what is kept in memory.
    """

    model: nn.Module
    plan: PlanT
    method: MethodT
    batches: list[Batch]
    seed: int
    checkpoint: BlocksT | None
    report: ReportT
    progress: Progress
    clock: Clock
    world: World = field(default_factory=World)
    leaves: int = 1
    memory: Memory = Memory()

    def record(self, layers: Sequence[LayerReport] | Sequence[SubLayerReport] | Sequence[MixtureReport]) -> None:
        """Report layers that are done. They are of the kind that the loop's report holds."""
        reported = cast("list[LayerReport | SubLayerReport | MixtureReport]", self.report.layers)
        for layer in layers:
            reported.append(layer)
            self.progress.layer_done(layer)


@contextmanager
def running(
    model: nn.Module,
    plan: PlanT,
    method: MethodT,
    batches: list[Batch] | None,
    *,
    seed: int,
    checkpoint: BlocksT | None,
    report: ReportT,
    progress: bool,
    world: World | None = None,
    leaves: int = 1,
    memory: Memory | None = None,
) -> Iterator[RunContext[PlanT, MethodT, ReportT, BlocksT]]:
    """Yield the context of one run. Within, the model is ready to run; afterwards its modes are restored.

    The arguments become the attributes of `RunContext`, except `progress`, which shows the bar, on the first rank.
    """
    world = world or World()
    bar = Progress(plan.steps, progress and world.leads)
    clock = Clock(next(model.parameters()).device)
    memory = memory or Memory()
    try:
        with prepared(model, seed), freed_memory_kept() if memory.hidden is None else freed_memory_returned():
            yield RunContext(model, plan, method, batches or [], seed, checkpoint, report, bar, clock, world, leaves, memory)
    finally:
        bar.close()


class Loop(ABC, Generic[PlanT, MethodT, ReportT, BlocksT]):
    """Base of the loops. Each prunes a model by the methods of one class.

    Attributes:
        REPORT: the class of the run's report.
        context: the run.
        plan: the context's plan.
        method: the context's method.
    """

    REPORT: ClassVar[type[Report] | type[RemovalReport] | type[ExpertReport]] = Report

    def __init__(self, context: RunContext[PlanT, MethodT, ReportT, BlocksT]) -> None:
        self.context = context
        self.plan, self.method = context.plan, context.method

    @classmethod
    @abstractmethod
    def make_plan(cls, model: nn.Module, method: MethodT, request: Request) -> tuple[PlanT, list[Batch] | None]:
        """Check all arguments. Return the plan, and the calibration batches if any are needed.

        Raises:
            TypeError: a bad argument.
            ValueError: a bad argument, or a model that the method cannot prune in this way.
        """

    @classmethod
    def finished_plan(cls, model: nn.Module, plan: PlanT, batches: list[Batch] | None, request: Request) -> PlanT:
        """Return the plan with the decisions that take work. All processes call this, once it is known that they were called alike."""
        return plan

    @classmethod
    def described(cls, request: Request) -> dict[str, object]:
        """Return the entries of the report's settings that describe the request, besides the plan's settings."""
        return {"pattern": str(request.default_pattern)}

    @abstractmethod
    def run(self) -> None:
        """Prune the model in place, and fill in the report."""
