"""A GPU for tests, which is as late as it may be, and finds out who touches memory without having waited for who used it before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

HOST, COPIES, COMPUTATION = "the host", "the copies", "the computation"
POISON = 0x7F  # the bytes of memory that nothing was copied to: NaN, or large numbers


class RaceError(AssertionError):
    """Two uses of the same bytes, one of which writes, in no order."""


@dataclass(frozen=True)
class Use:
    """A use of bytes by an actor, as the `time`-th of what it did."""

    actor: str
    time: int
    writes: bool
    begin: int
    end: int


@dataclass
class Memory:
    """Memory that was taken at once, and all uses of it."""

    bytes: torch.Tensor
    owner: str  # who takes it again without waiting for others, as streams do
    uses: list[Use] = field(default_factory=list)
    free: bool = False
    holders: set[str] = field(default_factory=set)  # whose use must have ended before it is given away again
    ends_after: dict[str, int] = field(default_factory=dict)  # what that is, once it is free


class FakeDevice:
    """A `Device` in host memory.

    Host, copies and computation each know how much of what the others did has happened before what they do next (vector clocks). A copy
    moves its bytes only when somebody waits for it.
    """

    def __init__(self) -> None:
        self._known = {actor: dict.fromkeys((HOST, COPIES, COMPUTATION), 0) for actor in (HOST, COPIES, COMPUTATION)}
        self._memories: list[Memory] = []
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.finished = 0

    # What `sparsekern.models.staging.Device` asks for.

    def pinned(self, size: int) -> torch.Tensor:
        return self._taken(HOST, size)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._given(COPIES, size).view(dtype).view(shape)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._learn(COPIES, self._known[HOST])  # it is enqueued now
        self._used(COPIES, source, writes=False)
        self._used(COPIES, target, writes=True)
        self._pending.append((self._known[COPIES][COPIES], target, source))

    def copied(self) -> dict[str, int]:
        return dict(self._known[COPIES])

    def finish(self, event: dict[str, int]) -> None:
        self.finished += 1
        self._move_until(event)
        self._learn(HOST, event)

    def wait(self, event: dict[str, int]) -> None:
        self._move_until(event)
        self._learn(COMPUTATION, event)

    def used(self, tensor: torch.Tensor) -> None:
        self._memory_of(tensor).holders.add(COMPUTATION)

    def follow(self) -> None:
        self._learn(COPIES, self._known[HOST])
        self._learn(COPIES, self._known[COMPUTATION])

    def lent(self, tensor: torch.Tensor) -> None:
        self._memory_of(tensor).holders.add(COPIES)

    # What a test does.

    def host_writes(self, tensor: torch.Tensor) -> None:
        """Note that the host writes to pinned memory."""
        self._used(HOST, tensor, writes=True)

    def computes_with(self, tensor: torch.Tensor) -> None:
        """Enqueue a computation that reads a tensor of the device."""
        self._learn(COMPUTATION, self._known[HOST])
        self._used(COMPUTATION, tensor, writes=False)

    def release(self, tensor: torch.Tensor) -> None:
        """Give memory of the device back, to be taken by the next `empty` of this size."""
        memory = self._memory_of(tensor)
        memory.free, memory.ends_after = True, {}
        for holder in memory.holders:
            known = self._known[holder].items()
            memory.ends_after |= {actor: max(time, memory.ends_after.get(actor, 0)) for actor, time in known}

    def computed(self, values: torch.Tensor) -> torch.Tensor:
        """Enqueue a computation that makes a tensor."""
        self._learn(COMPUTATION, self._known[HOST])
        found = self._given(COMPUTATION, values.nbytes).view(values.dtype).view(values.shape)
        self._used(COMPUTATION, found, writes=True)
        return found.copy_(values)

    def _given(self, actor: str, size: int) -> torch.Tensor:
        """Return memory of the device to an actor, that of a released tensor where there is one of this size."""
        for memory in self._memories:
            if memory.free and memory.owner == actor and len(memory.bytes) == size:
                memory.free = False
                self._move_until({COPIES: 0} | memory.ends_after)
                self._learn(actor, memory.ends_after)
                memory.holders.clear()
                return memory.bytes.fill_(POISON)
        return self._taken(actor, size)

    def _taken(self, actor: str, size: int) -> torch.Tensor:
        self._memories.append(Memory(torch.full((size,), POISON, dtype=torch.uint8), actor))
        return self._memories[-1].bytes

    def _learn(self, actor: str, event: dict[str, int]) -> None:
        known = self._known[actor]
        known.update({other: max(time, known[other]) for other, time in event.items()})

    def _move_until(self, event: dict[str, int]) -> None:
        for time, target, source in self._pending:
            if time <= event[COPIES]:
                target.copy_(source)
        self._pending = [copy for copy in self._pending if copy[0] > event[COPIES]]

    def _memory_of(self, tensor: torch.Tensor) -> Memory:
        place = tensor.untyped_storage().data_ptr()
        return next(memory for memory in self._memories if memory.bytes.untyped_storage().data_ptr() == place)

    def _used(self, actor: str, tensor: torch.Tensor, *, writes: bool) -> None:
        memory, known = self._memory_of(tensor), self._known[actor]
        known[actor] += 1
        begin = tensor.storage_offset() * tensor.itemsize
        use = Use(actor, known[actor], writes, begin, begin + tensor.nbytes)
        for before in memory.uses:
            overlap = before.begin < use.end and use.begin < before.end
            if overlap and (writes or before.writes) and known[before.actor] < before.time:
                raise RaceError(f"{actor} {'writes' if writes else 'reads'} bytes that {before.actor} may still use")
        memory.uses.append(use)
