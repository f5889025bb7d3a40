"""How a rank that works, or waits for others, learns that one of them has failed.

A rank that fails leaves a note in the store of the process group. A thread of each rank looks for notes from time to time. A rank that
works stops at its next look, `Watch.check`, or anywhere in a part that may be given up, `Watch.stoppable`. All waiting for other ranks
is done in threads of its own, so that an interrupt or a note ends it.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

SECONDS = 0.5  # between two looks at the notes
Result = TypeVar("Result")
Outcome = tuple[int, Any, BaseException | None]  # of a call: its number, what it returned, what it raised


class Stopped(Exception):
    """Raised where a rank works while another one has failed. The next exchange says how it failed."""


class Watch:
    """The notes of the ranks of one world.

    Exchanges are numbered, by the same numbers on all ranks. The note of a failure holds for the exchange at which all learn of it.

    Attributes:
        silent: why there can be no exchange any more; None while there can be.
    """

    def __init__(self, store: Any, number: Callable[[], int]) -> None:
        """Make a watch.

        Args:
            store: a store of `torch.distributed` that all ranks share.
            number: returns the number of the next exchange.
        """
        self.silent: str | None = None
        self._store, self._number = store, number
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[Outcome] | None = None
        self._users, self._over = 0, threading.Event()
        self._failed = -1  # the exchange at which all will learn of a failure
        self._working: int | None = None  # the thread that may be stopped anywhere
        self._thrown = False

    def tell_failure(self) -> None:
        """Leave a note that this rank has failed, for those that work."""
        with suppress(RuntimeError):  # the others hear of it at the next exchange all the same
            self._store.set(_failure(self._number()), "")

    def tell_silence(self, why: str) -> None:
        """Leave a note that this rank takes part in no exchange any more, for all others."""
        self.silent = self.silent or why
        with suppress(RuntimeError):
            self._store.set("silent", why)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look for notes within."""
        self._users += 1
        if self._users == 1:
            self._over, self._working, self._thrown = threading.Event(), None, False
            thread = threading.Thread(target=self._look, args=(self._over,), name="sparsekern-watch", daemon=True)
            thread.start()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._over.set()

    def check(self) -> None:
        """Raise `Stopped` if another rank has failed."""
        if self.silent is not None or self._failed == self._number():
            raise Stopped

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Raise `Stopped` within, wherever that is, if another rank fails. Nothing but time may be lost by it; exchanges are forbidden."""
        self.check()
        with self._lock:
            self._working = threading.get_ident()
        try:
            yield
        finally:
            with self._lock:
                self._working = None
                if self._thrown:
                    _throw(threading.get_ident(), None)  # it came too late

    def outcomes(self, calls: Sequence[Callable[[], object]]) -> Iterator[Outcome]:
        """Yield what calls that wait for other ranks return or raise, as they end. Each runs in a thread of its own.

        Raises:
            ConnectionAbortedError: a rank has left a note of silence.
        """
        waiting: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

        def run(number: int, call: Callable[[], object]) -> None:
            try:
                waiting.put((number, call(), None))
            except BaseException as error:
                waiting.put((number, None, error))

        self._waiting = waiting
        for number, call in enumerate(calls):
            threading.Thread(target=run, args=(number, call), name="sparsekern-wait", daemon=True).start()
        for _ in calls:
            number, found, error = waiting.get()
            if number < 0 and error is not None:
                raise error
            yield number, found, error

    def waited(self, call: Callable[[], Result]) -> Result:
        """Return what a call that waits for another rank returns, or raise what it raises. See `outcomes`."""
        ((_, found, error),) = self.outcomes([call])
        if error is not None:
            raise error
        return found

    def _look(self, over: threading.Event) -> None:
        while not over.wait(SECONDS):
            number = self._number()
            try:
                if self._store.check(["silent"]):
                    self.silent = self._store.get("silent").decode()
                failed = self._store.check([_failure(number)])
            except RuntimeError as error:
                if over.is_set():
                    return
                self.silent = f"the store of the process group cannot be reached: {str(error).splitlines()[0]}"
                failed = True
            if self.silent is not None and self._waiting is not None:
                self._waiting.put((-1, None, ConnectionAbortedError(self.silent)))
            if failed or self.silent is not None:
                self._notice(number)

    def _notice(self, number: int) -> None:
        with self._lock:
            self._failed = number
            if self._working is not None and not self._thrown and number == self._number():
                self._thrown = True
                _throw(self._working, Stopped)


def _failure(number: int) -> str:
    return f"failure before exchange {number}"


def _throw(thread: int, kind: type[BaseException] | None) -> None:
    """Raise an exception in a thread once it runs Python code again. None takes back one that was not raised yet."""
    thrown = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), thrown)
