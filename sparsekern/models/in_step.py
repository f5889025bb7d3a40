"""Many forwards of a streamed model at once, so that each block is read once for all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from torch import nn

from .streaming import in_memory, stream_of

T = TypeVar("T")


class _Abandoned(BaseException):
    """Raised in a forward that waits for a block when another one has failed."""


class _Forward(Generic[T]):
    """A forward in a thread of its own. It runs only between `go_on` and the block that it comes to next."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call, self._may_run, self._has_stopped = call, threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._abandoned = False
        self.block: int | None = None  # that it waits for
        self.result: list[T] = []
        self.error: BaseException | None = None
        self._thread.start()

    def go_on(self) -> None:
        """Run until the forward comes to another block, or ends.

        Raises:
            BaseException: whatever the forward raised.
        """
        self._may_run.release()
        self._has_stopped.acquire()
        if self.error is not None:
            raise self.error

    def wait_for(self, block: int) -> None:
        """Stop in front of a block, in the thread of the forward."""
        self.block = block
        self._has_stopped.release()
        self._may_run.acquire()
        self.block = None
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End the forward where it waits."""
        if self._thread.is_alive():
            self._abandoned = True
            self._may_run.release()
            self._thread.join()

    def owns_this_thread(self) -> bool:
        """Return whether the code that asks is a part of the forward."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        self._may_run.acquire()
        try:
            if not self._abandoned:
                self.result.append(self._call())
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self._has_stopped.release()


def in_step(model: nn.Module, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Yield what each call returns, in order.

    The calls run forwards of `model`. Those of a streamed model wait for each other at every block, which is then read once. Their
    hidden states are in memory at the same time. Only one call runs at a time, each in a thread of its own, so modes of torch that
    belong to a thread are set inside the call.

    Args:
        model: the model.
        calls: functions that run a forward each.
    """
    stream = stream_of(model)
    if stream is None:
        yield from (call() for call in calls)
        return
    forwards = [_Forward(call) for call in calls]

    def wait(block: int) -> None:
        for forward in forwards:
            if forward.owns_this_thread():
                forward.wait_for(block)

    try:
        with stream.stopping(wait):
            for forward in forwards:
                forward.go_on()
            while waiting := [forward.block for forward in forwards if forward.block is not None]:
                block = min(waiting)
                with in_memory(model, block):
                    for forward in forwards:
                        if forward.block == block:
                            forward.go_on()
    finally:
        for forward in forwards:
            forward.abandon()
    for forward in forwards:
        yield from forward.result
