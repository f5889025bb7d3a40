"""Blocks on their way to a GPU, while the block in front of them is pruned.

One thread reads the file into pinned memory, from where copies run on a stream of their own. Two parts of this memory take turns: the
file is read into one while the other is copied. There are three kinds of waiting, and each is needed:

* the thread waits for the copies from a part before it reads into that part again;
* the computation waits for the copies of a block before it uses the block;
* memory of the GPU is given to a later block once the computation with the earlier one has ended, see `Device.used`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .stored_files import Tensors
from .weight_files import Stored, dtype_of

PART = 64 << 20  # bytes of each part of the pinned memory: a copy of as many takes milliseconds
PARTS = 2
Event = Any
Read = Callable[[Stored, int, torch.Tensor], None]


class Device(Protocol):
    """A GPU with a stream for copies beside the one that computes."""

    def pinned(self, size: int) -> torch.Tensor:
        """Return host memory `[size]` uint8 that copies read while the host goes on."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the device that copies may write to at once."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin a copy between pinned memory and the device, after all copies begun before."""

    def follow(self) -> None:
        """Let the copies that are begun from now on wait for the computation enqueued so far."""

    def lent(self, tensor: torch.Tensor) -> None:
        """Keep the memory of a tensor that was computed, once it is released, until the copies begun by now have ended."""

    def copied(self) -> Event:
        """Return an event that happens once all copies begun so far are done."""

    def finish(self, event: Event) -> None:
        """Let the host wait for an event."""

    def wait(self, event: Event) -> None:
        """Let the computation that is enqueued from now on wait for an event."""

    def used(self, tensor: torch.Tensor) -> None:
        """Keep the memory of a tensor, once it is released, until the computation enqueued by then has ended."""


@dataclass(frozen=True)
class Staged:
    """Tensors that are being copied to a device.

    Attributes:
        tensors: by name.
        event: happens once they are there.
    """

    tensors: Tensors
    event: Event


class Staging:
    """The pinned memory for copies to one device. One thread at a time calls `load`, another one may call `arrived`."""

    def __init__(self, device: Device, size: int = PART) -> None:
        """Prepare copies. The memory is taken with the first one.

        Args:
            device: the device.
            size: bytes of each part of the pinned memory.
        """
        self._device, self._size = device, size
        self._parts: list[torch.Tensor] = []
        self._leaving: list[Event | None] = [None] * PARTS  # the end of the copies from each part
        self._part, self._taken = 0, 0

    def load(self, stored: Mapping[str, Stored], read: Read) -> Staged:
        """Read tensors, and begin to copy them to the device.

        Args:
            stored: their places in files, by name.
            read: reads bytes of one into memory, see `Stamps.read_into`.
        """
        found: Tensors = {}
        for name, entry in stored.items():
            found[name] = self._device.empty(entry.shape, dtype_of(entry))
            target, begin = found[name].reshape(-1).view(torch.uint8), 0
            while begin < entry.nbytes:
                room = self._room(entry.nbytes - begin)
                read(entry, begin, room)
                self._device.copy(target[begin : begin + len(room)], room)
                begin += len(room)
        return Staged(found, self._device.copied())

    def arrived(self, staged: Staged) -> Tensors:
        """Return tensors that the computation from now on may use, and that may be released at any time."""
        self._device.wait(staged.event)
        for tensor in staged.tensors.values():
            self._device.used(tensor)
        return staged.tensors

    def close(self) -> None:
        """Free the pinned memory, once no copy reads it."""
        if self._parts:
            self._device.finish(self._device.copied())
            self._parts, self._leaving, self._part, self._taken = [], [None] * PARTS, 0, 0

    def _room(self, most: int) -> torch.Tensor:
        """Return pinned memory that no copy reads, at most `most` bytes and at least one."""
        if not self._parts:
            self._parts = [self._device.pinned(self._size) for _ in range(PARTS)]
        if self._taken == self._size:
            self._leaving[self._part] = self._device.copied()
            self._part, self._taken = (self._part + 1) % PARTS, 0
            if (event := self._leaving[self._part]) is not None:
                self._device.finish(event)
        begin, self._taken = self._taken, min(self._taken + most, self._size)
        return self._parts[self._part][begin : self._taken]


class CudaDevice:
    """The `Device` of CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with torch.cuda.stream(self._stream):  # of whose own memory it is then
            return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def lent(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self._stream)

    def copied(self) -> Event:
        return self._stream.record_event()

    def finish(self, event: Event) -> None:
        event.synchronize()

    def wait(self, event: Event) -> None:
        for stream in self._computing():
            stream.wait_event(event)

    def used(self, tensor: torch.Tensor) -> None:
        for stream in self._computing():
            tensor.record_stream(stream)

    def _computing(self) -> tuple[torch.cuda.Stream, ...]:
        """Return the caller's stream, and the one that transformers' threads convert tensors in."""
        return torch.cuda.current_stream(self._device), torch.cuda.default_stream(self._device)


def staging_for(device: torch.device) -> Staging | None:
    """Return the staging for a device; None for a CPU, whose memory files are read into."""
    return Staging(CudaDevice(device)) if device.type == "cuda" else None
