"""Magnitude pruning: the smallest weights go. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..pattern import Pattern
from .base import Method, Solution, Statistics, check_choice
from .selection import keep_mask


@dataclass(frozen=True)
class Magnitude(Method):
    """Prune the weights of the smallest absolute value.

    Args:
        scope: for a sparsity, where the exact number of pruned weights is counted: `"matrix"` (the usual baseline) or `"row"`.
            N:M patterns do not look at it.

    Source: Han et al., Learning both weights and connections for efficient neural networks, 2015.
    """

    name: ClassVar[str] = "magnitude"
    statistic: ClassVar[None] = None

    scope: str = "matrix"

    def __post_init__(self) -> None:
        check_choice("Magnitude.scope", self.scope, ("matrix", "row"))

    def solve(self, weight: torch.Tensor, statistics: Statistics | None, pattern: Pattern) -> Solution:
        mask = keep_mask(weight.abs().float(), pattern, self.scope)
        return Solution(weight.masked_fill(~mask, 0), mask)
