"""The minutes that a run has, and how its steps share them."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Seconds that are left of a run. `cut` collects what did not fit."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + seconds
        self.cut: list[str] = []

    @property
    def left(self) -> float:
        return max(0.0, self._end - self._now())

    def part(self, share: float) -> Budget:
        """A budget of a share of what is left, for a part that must leave something to the next; `cut` is one for both."""
        part = Budget(share * self.left, self._now)
        part.cut = self.cut
        return part

    def allows(self, what: str, seconds: float) -> bool:
        """Whether `seconds` are left; if not, `what` is noted as cut."""
        if self.left >= seconds:
            return True
        self.cut.append(what)
        return False

    def share(self, most: float) -> float:
        """Seconds that a step may take which should not take more than `most`."""
        return min(most, self.left)
