"""The plan of a removal of experts."""

from __future__ import annotations

from dataclasses import dataclass

from ...models.mixtures import Cut, Mixture
from ..blockwise.course import Course
from ..plan import Plan, Request


@dataclass(frozen=True)
class ExpertPlan:
    """The plan of a removal of experts.

    Attributes:
        course: the course of the model's forwards.
        mixtures: the mixtures of each block.
        cut: what is cut.
        request: the request of the method that follows.
        then: the plan of the method that follows, as it will be for the smaller model; None for none.
    """

    course: Course
    mixtures: tuple[tuple[Mixture, ...], ...]
    cut: Cut
    request: Request
    then: Plan | None = None

    @property
    def parts(self) -> tuple[tuple[Mixture, ...], ...]:
        """What is reported of each block."""
        return self.mixtures

    @property
    def steps(self) -> int:
        """The number of mixtures, each of which is reported."""
        return len(self.cut.mixtures)

    @property
    def settings(self) -> dict[str, object]:
        """The settings of the result besides method, seed, calibration and model, as values that JSON can hold."""
        if self.then is None or self.request.then is None:
            return {}
        return {"then": self.request.then.settings(), **self.then.settings}
