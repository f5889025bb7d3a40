"""SparseGPT: prune column by column and let the weights not yet visited make up for each removal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import ops
from ..pattern import NM, Pattern, pruned_count
from .base import Method, Solution, Statistics, check_choice
from .magnitude import Magnitude
from .wanda import Wanda


@dataclass(frozen=True)
class SparseGPT(Method):
    """Optimal-brain-surgeon pruning of each linear against the Gram matrix of its calibration inputs.

    Args:
        damping: share of the Gram matrix's mean diagonal added to its diagonal (paper: 0.01), at least 0.
        block_size: columns in a block (paper: 128). N:M results do not depend on it.
        scope: for a sparsity, where the exact number of pruned weights is counted: `"block"` (paper: over all rows of each block
            of columns, chosen when the block is reached), `"row"` or `"matrix"`.
        mask: None lets the sweep choose. `"magnitude"` or `"wanda"` fixes that method's mask from the dense weights first, and the
            sweep only compensates. `"zeros"` takes the zeros that the weight has already, which must make up the pattern.

    Source: Frantar and Alistarh, SparseGPT, 2023, algorithm 1.
    """

    name: ClassVar[str] = "sparsegpt"
    statistic: ClassVar[str] = "gram"

    damping: float = 0.01
    block_size: int = 128
    scope: str = "block"
    mask: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.damping, (int, float)) or not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"SparseGPT.damping: expected a number of at least 0, got {self.damping!r}")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"SparseGPT.block_size: expected a whole number of at least 1, got {self.block_size!r}")
        check_choice("SparseGPT.scope", self.scope, ("block", "row", "matrix"))
        check_choice("SparseGPT.mask", self.mask, (None, "magnitude", "wanda", "zeros"))

    def solve(self, weight: torch.Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        factor = statistics.factor(self.damping)
        fixed = self._fixed_mask(weight, statistics, pattern)
        target = {"pattern": pattern} if fixed is None else {"mask": fixed}
        new_weight, mask, damped_error = ops.obs_sweep(weight, factor, **target, scope=self.scope, block_size=self.block_size)
        delta = new_weight.float() - weight.float()
        if weight.dtype == torch.float32:
            moved = torch.linalg.vector_norm(delta, dim=1, dtype=torch.float64).square()
            row_error = damped_error.double() - statistics.shift * moved
        else:  # the sweep's own error does not know of the rounding to a half dtype
            row_error = statistics.row_energy(delta)
        return Solution(new_weight, mask, row_error.clamp_(min=0))

    def _fixed_mask(self, weight: torch.Tensor, statistics: Statistics, pattern: Pattern) -> torch.Tensor | None:
        if self.mask is None:
            return None
        if self.mask == "zeros":
            return _existing_zeros(weight, pattern)
        return (Magnitude() if self.mask == "magnitude" else Wanda()).solve(weight, statistics, pattern).mask


def _existing_zeros(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    mask = weight != 0
    if isinstance(pattern, NM):
        made_up = bool((mask.unflatten(1, (-1, pattern.m)).sum(2) <= pattern.n).all())
    else:
        made_up = int((~mask).sum()) >= pruned_count(mask.numel(), pattern.sparsity)
    if not made_up:
        raise ValueError(f"SparseGPT.mask='zeros': the weight's zeros do not make up the pattern {pattern}")
    return mask
