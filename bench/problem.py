"""One benchmark problem, for a CPU and for a GPU: inputs, check, baselines and the least work that it needs.

`bench/ops/bench_<op>.py` lists an op's problems as `CASES`. pytest-benchmark times those with `cpu` goals (`bench/conftest.py`), and
`python -m bench.gpu` those with `cuda` goals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .results import seconds

Call = Callable[[], object]
Goals = Mapping[str, float | None]  # the baseline's name -> how many times as fast ours is to be; None: no goal

ROTATED_BYTES = 2**28  # of all copies of the inputs together: several times any L2 cache


class NotHere(Exception):
    """A benchmark or a baseline cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where problems are made.

    Attributes:
        device: Device of their tensors.
        toy: Whether they have toy sizes, to try them out.
        generator: Source of their random numbers.
    """

    device: torch.device
    toy: bool = False
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator(self.device).manual_seed(0))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def copies(self, bytes_a_call: int) -> range:
        """Return one index for each copy of the inputs, so many that together they exceed the caches."""
        return range(1 if self.toy else max(1, math.ceil(ROTATED_BYTES / bytes_a_call)))


@dataclass(frozen=True)
class Problem:
    """A problem with its inputs made.

    Attributes:
        calls: Ours, each on a copy of the inputs of its own. They take turns.
        check: Raises AssertionError unless the result of the first call is right.
        baselines: Other ways to the same result, by name.
        flops: The least operations of a call, at the rate of `unit`.
        read: The least bytes that a call reads.
        written: The least bytes that a call writes.
        unit: "fp32" or "bf16", the unit of a GPU whose rate bounds the operations; kernels on a CPU compute in float32.
        captured: Whether a CUDA graph can hold a call, which gives its time on the device alone.
        of_dense: Sizes of ours as shares of the dense ones, by what has them; `check` may fill it in.
    """

    calls: Sequence[Call]
    check: Callable[[object], None]
    baselines: Mapping[str, Sequence[Call]] = field(default_factory=dict)
    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0
    unit: str = "fp32"
    captured: bool = True
    of_dense: dict[str, float] = field(default_factory=dict)


class Turns:
    """A call that makes the next of `calls` each time, and keeps the last result."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.made, self.result = calls, 0, None

    def __call__(self) -> object:
        self.result = self.calls[self.made % len(self.calls)]()
        self.made += 1
        return self.result


@dataclass(frozen=True)
class Taken:
    """Seconds of a call as a program makes it, of its replay (None: not captured) and of each baseline; and the least there is."""

    called: float
    on_device: float | None
    against: Mapping[str, float]
    floor: float

    @property
    def share(self) -> float:
        return self.floor / (self.on_device or self.called)


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


@dataclass(frozen=True)
class Case:
    """A problem by name, with its sizes.

    Attributes:
        name: Unique among all cases; rows of results have it.
        make: Makes the problem: `make(place, **sizes)`.
        sizes: Arguments of `make`.
        toy: Those that toy sizes replace.
        op: The op whose implementations a GPU measures one by one; None where several ops make up the call.
        cpu: Baselines and goals on a CPU; None: not timed there.
        cuda: Baselines and goals on a GPU; None: not timed there.
        device_goals: Further goals on a GPU.
        rounds: Timed calls on a CPU; with 1, the result of that call is the one checked.
        likely_seconds: What a GPU needs for everything, one implementation after another.
    """

    name: str
    make: Callable[..., Problem]
    sizes: Mapping[str, object]
    toy: Mapping[str, object]
    op: str | None = None
    cpu: Goals | None = None
    cuda: Goals | None = None
    device_goals: tuple[Within | Share, ...] = ()
    rounds: int = 5
    likely_seconds: float = 2.5

    def problem(self, place: Place) -> Problem:
        """Return the problem on `place`, the same each time.

        Raises:
            NotHere: It cannot run there.
        """
        place.generator.manual_seed(0)
        return self.make(place, **{**self.sizes, **(self.toy if place.toy else {})})

    def comparisons(self) -> list[Comparison]:
        """Return what is timed on a CPU: the case against each of its baselines, or alone."""
        if self.cpu is None:
            return []
        return [Comparison(self, baseline) for baseline in self.cpu] or [Comparison(self, None)]


@dataclass(frozen=True)
class Comparison:
    """A case on a CPU against one of its baselines, or against none."""

    case: Case
    baseline: str | None

    @property
    def name(self) -> str:
        """The case's name, with the baseline where there are several."""
        return f"{self.case.name}, against {self.baseline}" if len(self.case.cpu or ()) > 1 else self.case.name

    @property
    def goal(self) -> float | None:
        return self.case.cpu[self.baseline] if self.case.cpu and self.baseline else None
