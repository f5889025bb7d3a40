"""Random pruning: the baseline that every criterion has to beat. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..pattern import Pattern
from ._fields import choice
from .base import Method, Solution, Statistics
from .selection import keep_mask


@dataclass(frozen=True)
class Random(Method):
    """Prune weights at random, each with the same probability.

    The numbers are drawn on the CPU from torch's generator, which `prune` seeds for each linear from its `seed` and the linear's name:
    the same weights go on any device, and whether or not a run was resumed. Weights that are zero already go first.
    """

    name: ClassVar[str] = "random"
    statistic: ClassVar[None] = None

    scope: str = choice(
        "matrix", ("matrix", "row"), help="where a sparsity is counted: over each matrix or each row; N:M ignores it"
    )

    def solve(self, weight: torch.Tensor, statistics: Statistics | None, pattern: Pattern) -> Solution:
        scores = torch.rand(weight.shape, device="cpu").to(weight.device).masked_fill_(weight == 0, -1)
        mask = keep_mask(scores, pattern, self.scope)
        return Solution(weight.masked_fill(~mask, 0), mask)
