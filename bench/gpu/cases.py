"""What one benchmark is, and how it becomes rows: correct first, then timed, each implementation by itself, against baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from sparsekern import backends

from ..results import Row, seconds
from .device import Call, Ceilings, replayed_seconds_of, seconds_of

ROTATED_BYTES = 2**28  # what the inputs take together, where one call has less: several times any L2
SECTION = "ops"


@dataclass(frozen=True)
class Faster:
    """At least `times` as fast as the baseline of that name."""

    times: float
    than: str

    def __str__(self) -> str:
        return f">= {self.times}x {self.than}"

    def met(self, taken: Taken) -> bool:
        return taken.against[self.than] / taken.called >= self.times


@dataclass(frozen=True)
class Within:
    """At most so many seconds a call."""

    seconds: float

    def __str__(self) -> str:
        return f"<= {seconds(self.seconds)}"

    def met(self, taken: Taken) -> bool:
        return taken.called <= self.seconds


@dataclass(frozen=True)
class Share:
    """At least this share of the floor, on the device alone."""

    share: float

    def __str__(self) -> str:
        return f">= {self.share:.0%} of the floor"

    def met(self, taken: Taken) -> bool:
        return taken.share >= self.share


Goal = Faster | Within | Share


@dataclass(frozen=True)
class Problem:
    """One benchmark with its inputs made.

    `calls` run ours, each on inputs of its own; `check` asserts that what the first returns is right, the rest is then taken to be.
    `baselines` do the same otherwise. `flops` and `bytes` are the least that a call must compute, at the rate of `unit`, and move.
    `captured`: whether a CUDA graph can hold ours, which gives the time on the device alone.
    """

    calls: Sequence[Call]
    check: Callable[[object], None]
    baselines: dict[str, Sequence[Call]] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    unit: str = "fp32"
    goals: tuple[Goal, ...] = ()
    captured: bool = True


@dataclass(frozen=True)
class Taken:
    """Seconds of a call as a program makes it, of its replay (None: not captured) and of each baseline; and the least there is."""

    called: float
    on_device: float | None
    against: dict[str, float]
    floor: float

    @property
    def share(self) -> float:
        return self.floor / (self.on_device or self.called)


class NotHere(Exception):
    """A benchmark cannot run in this build; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where benchmarks run, whether with toy sizes, and whether whole models are run under torch's profiler."""

    device: torch.device
    small: bool
    ceilings: Ceilings
    profile: bool = False

    def size(self, real: int, toy: int) -> int:
        return toy if self.small else real

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def copies(self, bytes_a_call: int) -> range:
        """One for each set of inputs, so that together they do not fit into the L2."""
        return range(1 if self.small else max(1, math.ceil(ROTATED_BYTES / bytes_a_call)))


@dataclass(frozen=True)
class Case:
    """A benchmark by name. `op`: whose implementations are measured one by one; None where several ops make up the call."""

    name: str
    op: str | None
    make: Callable[[Place], Problem]
    likely_seconds: float

    def rows(self, place: Place) -> Iterator[Row]:
        """A row for each implementation; what fails or cannot run is a row that says so."""
        torch.manual_seed(0)
        try:
            problem = self.make(place)
        except NotHere as reason:
            yield Row(SECTION, self.name, f"not run: {reason}")
            return
        except RuntimeError as error:
            yield failed(self.name, error)
            return
        against = {name: seconds_of(calls, place.device) for name, calls in problem.baselines.items()}
        for by in self._implementations(place):
            name = f"{self.name} ({by})" if by else self.name
            with backends.use(**{self.op: by}) if by else nullcontext():
                yield self._row(name, problem, against, place)

    def _implementations(self, place: Place) -> list[str | None]:
        known = backends.implementations(self.op) if self.op and place.device.type == "cuda" else ()
        return [implementation.name for implementation in known] or [None]

    def _row(self, name: str, problem: Problem, against: dict[str, float], place: Place) -> Row:
        goals = ", ".join(map(str, problem.goals))
        try:
            problem.check(problem.calls[0]())
            called = seconds_of(problem.calls, place.device)
            on_device = replayed_seconds_of(problem.calls, place.device) if problem.captured else None
        except (AssertionError, ValueError, RuntimeError) as error:
            return failed(name, error, goals)
        floor = place.ceilings.floor(flops=problem.flops, unit=problem.unit, bytes=problem.bytes)
        taken = Taken(called, on_device, against, floor)
        return Row(
            SECTION,
            name,
            _reached(taken, problem),
            ", ".join(f"{other} {seconds(took)}" for other, took in against.items()),
            goals,
            all(goal.met(taken) for goal in problem.goals) if problem.goals else None,
            {
                "seconds": called,
                "seconds_on_device": on_device,
                "baseline_seconds": against,
                "flops": problem.flops,
                "unit": problem.unit,
                "bytes": problem.bytes,
                "floor_seconds": floor,
                "share_of_floor": round(taken.share, 4),
            },
        )


def _reached(taken: Taken, problem: Problem) -> str:
    parts = [f"**{took / taken.called:.2f}x** {name}" for name, took in taken.against.items()]
    parts.append(f"{seconds(taken.called)} a call")
    if problem.captured:
        parts.append("not captured" if taken.on_device is None else f"{seconds(taken.on_device)} on the device")
    if taken.floor:
        parts.append(f"{taken.share:.0%} of the floor {seconds(taken.floor)}")
    return ", ".join(parts)


def failed(name: str, error: Exception, goals: str = "") -> Row:
    """A row for what an error has ended; raises the error if the device is lost to this process."""
    if "CUDA error" in str(error):
        raise error
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if "was asked for, but" in what:  # the words of sparsekern.backends
        return Row(SECTION, name, f"not run: {what}", goal=goals)
    return Row(SECTION, name, f"**failed**: {what}", goal=goals, met=False)


CASES: list[Case] = []


def case(name: str, op: str | None = None, likely_seconds: float = 3.0) -> Callable:
    """Adds a function that makes a `Problem` to `CASES`, the most important first."""

    def add(make: Callable[[Place], Problem]) -> Callable:
        CASES.append(Case(name, op, make, likely_seconds))
        return make

    return add
