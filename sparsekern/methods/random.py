"""Random pruning: the baseline that every criterion has to beat. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..pattern import Pattern
from .base import Method, Solution, Statistics, check_choice
from .selection import keep_mask


@dataclass(frozen=True)
class Random(Method):
    """Prune weights at random, each with the same probability.

    The numbers are drawn on the CPU from torch's generator, which `prune` seeds for each linear from its `seed` and the linear's name:
    the same weights go on any device, and whether or not a run was resumed. Weights that are zero already go first.

    Args:
        scope: for a sparsity, where the exact number of pruned weights is counted: `"matrix"` or `"row"`. N:M patterns do not look
            at it.
    """

    name: ClassVar[str] = "random"
    statistic: ClassVar[None] = None

    scope: str = "matrix"

    def __post_init__(self) -> None:
        check_choice("Random.scope", self.scope, ("matrix", "row"))

    def solve(self, weight: torch.Tensor, statistics: Statistics | None, pattern: Pattern) -> Solution:
        scores = torch.rand(weight.shape, device="cpu").to(weight.device).masked_fill_(weight == 0, -1)
        mask = keep_mask(scores, pattern, self.scope)
        return Solution(weight.masked_fill(~mask, 0), mask)
