"""Settings of the whole process that several runs in threads may change at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class PutBack(Generic[Key, Value]):
    """A setting that is restored once the last of the runs that change it has ended.

    If each run restored the value that it found, the first to end would take the setting from the others. The last would restore
    the value that another run had set.

    Attributes:
        lock: held while the setting is read or written.
    """

    def __init__(self, get: Callable[[Key], Value], put: Callable[[Key, Value], object]) -> None:
        """Make a setting with the functions that read and write the value of a key."""
        self.lock = threading.RLock()
        self._get, self._put = get, put
        self._runs: dict[Key, int] = {}
        self._before: dict[Key, Value] = {}

    @contextmanager
    def kept(self, key: Key) -> Iterator[None]:
        """Count as a run that changes the value of `key` within."""
        with self.lock:
            if not self._runs.get(key):
                self._before[key] = self._get(key)
            self._runs[key] = self._runs.get(key, 0) + 1
        try:
            yield
        finally:
            with self.lock:
                self._runs[key] -= 1
                if not self._runs[key]:
                    self._put(key, self._before.pop(key))
