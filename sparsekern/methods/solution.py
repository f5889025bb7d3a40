"""What a method returns for a linear, how much work that is, and the processes that share it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Solution(NamedTuple):
    """A pruned weight matrix.

    Attributes:
        weight: the pruned weight, of the same shape and dtype as the weight given to `solve`.
        row_error: `[out_features]` float64, the squared output error of each row over the calibration tokens. It is `d G d^T` with
            the change `d` of the row, rounded to the weight's dtype, and the undamped Gram matrix `G`. None where the method does
            not compute it.
        values_error: `[out_features]` float64, the part of `row_error` that rounding the kept weights made; None where they are not
            rounded.
    """

    weight: torch.Tensor
    row_error: torch.Tensor | None = None
    values_error: torch.Tensor | None = None


class Work(NamedTuple):
    """An amount of work, in multiply-adds.

    Attributes:
        shared: the part that is done once for all linears with the same inputs.
        own: the part of one linear, in proportion to its rows where they are divided among processes.
        fixed: the part of one linear that each process does that solves some of its rows.
    """

    shared: float
    own: float
    fixed: float = 0.0


class Team:
    """The processes that solve the rows of one linear together. This one is a process alone.

    Attributes:
        place: the number of this process, whose rows follow those of lower numbers.
        size: the number of processes.
    """

    place, size = 0, 1

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the sum of whole numbers over all processes, which all call this. The argument is not used afterwards."""
        return counts
