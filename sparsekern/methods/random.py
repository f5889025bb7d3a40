"""Random pruning: the baseline for every criterion. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..pattern import Pattern
from ._fields import choice
from .base import LinearMethod
from .random_numbers import generator
from .selection import keep_mask
from .solution import Solution


@dataclass(frozen=True)
class Random(LinearMethod):
    """Prune weights at random, each with the same probability.

    The numbers are drawn on the CPU from a generator that `prune` seeds for each linear from its `seed` and the linear's name. So the
    same weights are pruned on any device, in any thread, and in a resumed run. Weights that are already zero are pruned first.

    Example:
        >>> report = sparsekern.prune(model, sparsekern.Random(), 0.5, seed=1, progress=False)
        >>> report.sparsity
        0.5
    """

    name: ClassVar[str] = "random"

    scope: str = choice(
        "matrix", ("matrix", "row"), help="where a sparsity is counted: over each matrix or each row; N:M ignores it"
    )

    def solve(self, weight: torch.Tensor, statistics: None, pattern: Pattern) -> Solution:
        scores = (
            torch.rand(weight.shape, device="cpu", dtype=torch.float32, generator=generator())
            .to(weight.device)
            .masked_fill_(weight == 0, -1)
        )
        mask = keep_mask(scores, pattern, self.scope)
        return Solution(weight.masked_fill(~mask, 0))
