"""The minutes that a run has, and how its steps share them."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """The seconds left of a run; `cut` collects what did not fit."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + seconds
        self.cut: list[str] = []

    @property
    def left(self) -> float:
        return max(0.0, self._end - self._now())

    def part(self, share: float) -> Budget:
        """Return a budget of a share of the time left, for a part that must leave something to the next; both share `cut`."""
        part = Budget(share * self.left, self._now)
        part.cut = self.cut
        return part

    def allows(self, what: str, seconds: float) -> bool:
        """Return whether `seconds` are left; if not, note `what` as cut."""
        if self.left >= seconds:
            return True
        self.cut.append(what)
        return False

    def share(self, most: float) -> float:
        """Return the seconds that a step may take, at most `most`."""
        return min(most, self.left)
