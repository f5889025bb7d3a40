"""Rows of the benchmarks of a device: the result is checked, then each implementation is timed by itself, against baselines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from sparsekern import backends

from ..problem import Case, Faster, NotHere, Place, Problem, Share, Taken, Within
from ..results import Row, seconds
from .device import Ceilings, replayed_seconds_of, seconds_of

SECTION = "ops"
# What errors say after which a process can do nothing more on its device.
LOST = ("illegal", "misaligned", "unspecified launch failure", "device-side assert", "uncorrectable")


@dataclass(frozen=True, kw_only=True)
class DevicePlace(Place):
    """Where benchmarks of a device run.

    Attributes:
        ceilings: What the device reaches.
        profile: Whether whole models run under torch's profiler.
    """

    ceilings: Ceilings
    profile: bool = False

    def size(self, real: int, toy: int) -> int:
        return toy if self.toy else real


@dataclass(frozen=True)
class DeviceCase:
    """A case on a device."""

    case: Case

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def likely_seconds(self) -> float:
        return self.case.likely_seconds

    @property
    def has_goal(self) -> bool:
        return bool(self.case.device_goals) or any(self.case.cuda.values())

    def rows(self, place: DevicePlace) -> Iterator[Row]:
        """Yield a row for each implementation; what fails or cannot run is a row that says so."""
        try:
            problem = self.case.problem(place)
            wanted = {name: problem.baselines[name] for name in self.case.cuda if name in problem.baselines}
            against = {name: seconds_of(calls, place.device) for name, calls in wanted.items()}
        except NotHere as reason:
            yield Row(SECTION, self.name, f"not run: {reason}")
            return
        except Exception as error:  # of torch, Triton or a library: a row, unless the device is lost
            yield failed(self.name, error)
            return
        for by in self._implementations(place):
            name = f"{self.name} ({by})" if by else self.name
            with backends.asked({self.case.op: by}) if by else nullcontext():
                yield self._row(name, problem, against, place)

    def _implementations(self, place: Place) -> list[str | None]:
        known = backends.implementations(self.case.op) if self.case.op and place.device.type == "cuda" else ()
        return [implementation.name for implementation in known] or [None]

    def _goals(self, against: dict[str, float]) -> list[Faster | Within | Share]:
        return [
            *(Faster(times, than) for than, times in self.case.cuda.items() if times and than in against),
            *self.case.device_goals,
        ]

    def _row(self, name: str, problem: Problem, against: dict[str, float], place: DevicePlace) -> Row:
        goals = self._goals(against)
        told = ", ".join(map(str, goals))
        try:
            problem.check(problem.calls[0]())
            called = seconds_of(problem.calls, place.device)
            on_device = replayed_seconds_of(problem.calls, place.device) if problem.captured else None
        except Exception as error:
            return failed(name, error, told)
        nbytes = problem.read + problem.written
        floor = place.ceilings.floor(flops=problem.flops, unit=problem.unit, bytes=nbytes)
        taken = Taken(called, on_device, against, floor)
        return Row(
            SECTION,
            name,
            _reached(taken, problem),
            ", ".join(f"{other} {seconds(took)}" for other, took in against.items()),
            told,
            all(goal.met(taken) for goal in goals) if goals else None,
            {
                "seconds": called,
                "seconds_on_device": on_device,
                "baseline_seconds": against,
                "flops": problem.flops,
                "unit": problem.unit,
                "bytes": nbytes,
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
    """Return a row for what an error has ended.

    Raises:
        Exception: The error itself, if this process has lost the device.
    """
    if "CUDA error" in str(error) and any(words in str(error) for words in LOST):
        raise error
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if "was requested, but" in what:  # the words of sparsekern.backends
        return Row(SECTION, name, f"not run: {what}", goal=goals)
    return Row(SECTION, name, f"**failed**: {what}", goal=goals, met=False)
