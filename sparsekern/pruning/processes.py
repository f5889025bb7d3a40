"""What a run of several ranks checks before its work, and what all ranks share at its end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from .._warnings import SparsekernWarning
from ..methods import ExpertMethod, LinearMethod, Method
from ..ranks import LEAVES, World
from ..reports.base import BaseReport, phases
from .batches import Batch
from .progress import Clock

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
MOST_LEAVES = 1024


def on_all_ranks(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make an exception of `function` on one rank the same exception on all ranks."""

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with World.current().together():
            return function(*args, **kwargs)

    return run


def refuse_ranks(what: str, why: str) -> None:
    """Raise `ValueError` if there are several ranks. The message begins with `what`, the argument, and ends with `why`."""
    world = World.current()
    if world.size > 1:
        raise ValueError(f"{what}: expected a single process, got {world.size} ranks; {why}")


def checked_leaves(leaves: int | None, world: World, method: Method) -> int:
    """Return the number of leaves of sums over batches, see `prune`.

    Args:
        leaves: the number, or None.
        world: the ranks.
        method: the method.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is not a power of two, or the number of ranks does not divide it; or the method cannot be shared by ranks.
    """
    if leaves is not None and (isinstance(leaves, bool) or not isinstance(leaves, int)):
        raise TypeError(f"leaves: expected a power of two up to {MOST_LEAVES}, got {leaves!r}")
    if leaves is not None and (not 1 <= leaves <= MOST_LEAVES or leaves & (leaves - 1)):
        raise ValueError(f"leaves: expected a power of two up to {MOST_LEAVES}, got {leaves}")
    if not isinstance(method, (LinearMethod, ExpertMethod)):
        if leaves not in (None, 1):
            raise ValueError(f"leaves: expected None for {type(method).__name__}, which does not work block by block, got {leaves}")
        refuse_ranks("method", f"{type(method).__name__} does not work block by block")
    found = leaves or (LEAVES if world.size > 1 else 1)
    if found % world.size:
        raise ValueError(
            f"leaves: expected a power of two that the number of ranks divides, got {found} for {world.size} ranks; start 1, 2, 4 "
            f"or {LEAVES} of them, or give more leaves to a greater power of two (leaves=, --leaves)"
        )
    return found


def check_same_run(world: World, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Raise `ValueError` on all ranks if they were called with other arguments, versions, models or data. The message names it."""
    if world.size > 1:
        world.check_alike({**{name: environment[name] for name in environment if name != "device"}, **settings})


def say_idle(world: World, batches: Sequence[Batch]) -> None:
    """Warn on the first rank if there are fewer batches than ranks."""
    if world.leads and len(batches) < world.size:
        warnings.warn(
            f"{len(batches)} calibration batches for {world.size} ranks, so that some ranks run none; a smaller batch_size "
            "(--batch-size) makes more",
            SparsekernWarning,
            stacklevel=4,
        )


class Traffic:
    """What this rank sends during a run, and what it has to send by the formula, in bytes."""

    def __init__(self, world: World) -> None:
        """Begin to count."""
        self._world, self._sent, self._formula = world, world.sent, world.formula

    def tell(self, report: BaseReport, clock: Clock, blocks: int) -> None:
        """Put the number of ranks into a report, and of each its seconds by phase and what it sent. All ranks call this.

        Args:
            report: the report of the run.
            clock: the clock of this rank.
            blocks: the number of blocks that were solved.
        """
        world = self._world
        if world.size == 1:
            return
        report.versions["ranks"] = world.size
        sent, formula = world.sent - self._sent, world.formula - self._formula
        for rank, (seconds, own, least) in enumerate(world.gather("seconds", [clock.seconds, sent, formula])):
            amount = f"{own / max(blocks, 1) / 1e6:,.3f} MB sent a block, {least / max(blocks, 1) / 1e6:,.3f} MB by the formula"
            report.measured[f"rank {rank}"] = f"seconds: {phases(seconds)}; {amount}"
