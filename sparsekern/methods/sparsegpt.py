"""SparseGPT: prune column by column, and let the weights not yet visited compensate for each removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import ops
from ..pattern import NM, Pattern, pruned_count
from ._fields import choice, number, whole
from .base import LinearMethod, Solution
from .magnitude import Magnitude
from .statistics import Gram, HasGram
from .wanda import Wanda


@dataclass(frozen=True)
class SparseGPT(LinearMethod):
    """Optimal-brain-surgeon pruning of each linear against the Gram matrix of its calibration inputs.

    Example:
        >>> report = sparsekern.prune(model, sparsekern.SparseGPT(damping=0.02), "2:4", calibration=ids, progress=False)
        >>> max(layer.error for layer in report.layers) < 0.5
        True

    Source: Frantar and Alistarh, SparseGPT, 2023, algorithm 1.
    """

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar = Gram

    damping: float = number(
        0.01, at_least=0, help="share of the Gram matrix's mean diagonal that is added to its diagonal (paper: 0.01)"
    )
    block_size: int = whole(128, at_least=1, help="columns in a block (paper: 128); results of N:M do not depend on it")
    scope: str = choice(
        "block",
        ("block", "row", "matrix"),
        help="where a sparsity is counted: over all rows of each block of columns (paper), each row or the matrix",
    )
    mask: str | None = choice(
        None,
        (None, "magnitude", "wanda", "zeros"),
        help="mask fixed before the sweep: that of the named method, or the weight's own zeros; None lets the sweep choose",
    )

    def solve(self, weight: torch.Tensor, statistics: HasGram, pattern: Pattern) -> Solution:
        factor = statistics.factor(self.damping)
        fixed = self._fixed_mask(weight, statistics, pattern)
        target = {"pattern": pattern} if fixed is None else {"mask": fixed}
        new_weight, _, damped_error = ops.obs_sweep(weight, factor, **target, scope=self.scope, block_size=self.block_size)
        delta = new_weight.float() - weight.float()
        if weight.dtype == torch.float32:
            moved = torch.linalg.vector_norm(delta, dim=1, dtype=torch.float64).square()
            row_error = damped_error.double() - statistics.shift * moved
        else:  # the sweep's own error does not include the rounding to a half dtype
            row_error = statistics.row_energy(delta)
        return Solution(new_weight, row_error.clamp_(min=0))

    def _fixed_mask(self, weight: torch.Tensor, statistics: HasGram, pattern: Pattern) -> torch.Tensor | None:
        if self.mask is None:
            return None
        if self.mask == "zeros":
            return _existing_zeros(weight, pattern)
        return Magnitude().mask_of(weight, pattern) if self.mask == "magnitude" else Wanda().mask_of(weight, statistics, pattern)


def _existing_zeros(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    mask = weight != 0
    if isinstance(pattern, NM):
        made_up = bool((mask.unflatten(1, (-1, pattern.m)).sum(2) <= pattern.n).all())
    else:
        made_up = int((~mask).sum()) >= pruned_count(mask.numel(), pattern.sparsity)
    if not made_up:
        raise ValueError(f"SparseGPT.mask='zeros': the weight's zeros do not make up the pattern {pattern}")
    return mask
