"""How experts are calibrated: the weight of their tokens, and what happens to those that no token reached."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods import Method, check_choice

EQUAL, ROUTING = "equal", "routing"
WEIGHTINGS = (EQUAL, ROUTING)
MAGNITUDE, DENSE, ERROR = "magnitude", "dense", "error"
UNSEEN = (MAGNITUDE, DENSE, ERROR)


@dataclass(frozen=True)
class ExpertRules:
    """How experts are calibrated.

    Attributes:
        weighting: `"equal"` counts each token once in the statistics of its experts; `"routing"` scales it by its routing weight.
        unseen: what happens to linears that no calibration token reached, such as those of experts: `"magnitude"`, `"dense"` or `"error"`.
    """

    weighting: str = EQUAL
    unseen: str = MAGNITUDE

    def __post_init__(self) -> None:
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("unseen", self.unseen, UNSEEN)

    def check_unweighted(self, method: Method) -> None:
        """Raise `ValueError` if a method without statistics of tokens is asked to weight them."""
        if self.weighting != EQUAL:
            raise ValueError(
                f"weighting: expected {EQUAL!r} for {type(method).__name__}, which takes no statistics of tokens here, "
                f"got {self.weighting!r}"
            )
