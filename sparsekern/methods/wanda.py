"""Wanda: score each weight by its size times the norm of its input. No weight is updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..pattern import Pattern
from .base import LinearMethod
from .selection import keep_mask
from .solution import Solution
from .statistics import FeatureNorm, HasNorms


@dataclass(frozen=True)
class Wanda(LinearMethod):
    """Prune, in each output row, the weights of the smallest `|W_ij| * ||X_j||_2`.

    A sparsity `s` prunes exactly `floor(in_features * s)` weights of every row. N:M keeps N of each M consecutive inputs.

    Example:
        >>> report = sparsekern.prune(model, sparsekern.Wanda(), "2:4", calibration=ids, progress=False)
        >>> report.sparsity
        0.5

    Source: Sun et al., A simple and effective pruning approach for large language models, 2023, equation 1.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar = FeatureNorm

    def solves_rows_alone(self, pattern: Pattern) -> bool:
        return True

    def solve(self, weight: torch.Tensor, statistics: HasNorms, pattern: Pattern) -> Solution:
        return Solution(weight.masked_fill(~self.mask_of(weight, statistics, pattern), 0))

    def mask_of(self, weight: torch.Tensor, statistics: HasNorms, pattern: Pattern) -> torch.Tensor:
        """Return the mask, True where a weight is kept. A kept weight may be zero itself."""
        scores = weight.abs().float() * statistics.sum_squares.sqrt()
        return keep_mask(scores, pattern, "row")
