"""One pruning run: what a loop is given, what a block comes to, and what all loops share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..methods import Method
from ..models import Linear
from ..reports.report import LayerReport, Report
from .batches import Batch
from .host_memory import freed_memory_kept
from .plan import Request
from .progress import Clock, Progress
from .session import prepared


class PlanLike(Protocol):
    """What is to be pruned, every argument being checked."""

    @property
    def steps(self) -> int:
        """The number of layers to report."""

    @property
    def settings(self) -> dict[str, object]:
        """What the result depends on besides method, seed, calibration and model; JSON can hold it."""


@dataclass(frozen=True)
class BlockResult:
    """What one block comes to.

    Attributes:
        weights: the pruned weights, by linear name.
        layers: a report of each layer (dataclasses).
        totals: what adds up over datasets, see `SharedStatistics.totals`; empty where nothing is to be kept.
    """

    weights: Mapping[str, torch.Tensor]
    layers: Sequence[Any]
    totals: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Blocks(Protocol):
    """Where the finished blocks of a run are kept."""

    def save(self, index: int, result: BlockResult) -> None:
        """Keep the result of block `index`."""

    def holds(self, index: int) -> bool:
        """Return whether block `index` is finished."""

    def load(self, index: int, linears: Sequence[Linear]) -> BlockResult | None:
        """Return the result of block `index`, or None where it is not finished."""


@dataclass(frozen=True)
class RunContext:
    """Everything that a loop is given.

    Attributes:
        model: the model, ready to run: in evaluation mode, without gradients.
        plan: what to prune; its class is that of the loop.
        method: the method's config.
        batches: the calibration data; None for a method without.
        seed: what all random numbers derive from.
        checkpoint: where finished blocks are kept; None keeps none.
        report: takes in what each layer came to.
        progress: the bar.
        clock: seconds by phase.
    """

    model: nn.Module
    plan: Any
    method: Method
    batches: list[Batch] | None
    seed: int
    checkpoint: Any
    report: Report
    progress: Progress
    clock: Clock

    def record(self, layers: Sequence[LayerReport]) -> None:
        """Report layers that are done."""
        for layer in layers:
            self.report.layers.append(layer)
            self.progress.layer_done(layer)


@contextmanager
def running(
    model: nn.Module,
    plan: PlanLike,
    method: Method,
    batches: list[Batch] | None,
    *,
    seed: int,
    checkpoint: Any,
    report: Report,
    progress: bool,
) -> Iterator[RunContext]:
    """Yield the context of one run. Within, the model is ready to run; afterwards its modes are as before.

    The arguments become the attributes of `RunContext`; `progress` says whether to show the bar.
    """
    bar = Progress(plan.steps, progress)
    clock = Clock(next(model.parameters()).device)
    try:
        with prepared(model, seed), freed_memory_kept():
            yield RunContext(model, plan, method, batches, seed, checkpoint, report, bar, clock)
    finally:
        bar.close()


class Loop(ABC):
    """Base of the loops: how the methods of one class prune a model."""

    REPORT: ClassVar[type[Report]] = Report

    def __init__(self, context: RunContext) -> None:
        self.context = context

    @classmethod
    @abstractmethod
    def make_plan(cls, model: nn.Module, method: Any, request: Request) -> tuple[Any, list[Batch] | None]:
        """Check everything, and return what to prune with the calibration batches, if any are needed.

        Raises:
            TypeError: a bad argument.
            ValueError: a bad argument, or a model that the method cannot prune so.
        """

    @classmethod
    def described(cls, request: Request) -> dict[str, object]:
        """Return what the report says of the request besides the plan's settings."""
        return {"pattern": str(request.default_pattern)}

    @abstractmethod
    def run(self) -> None:
        """Prune the model in place, and fill in the report."""
