"""Values of 4 bits: what a method left of a weight, rounded to multiples of a scale for each row and 64 columns.

The mask is the method's. A fit on it, the scales, the sweep that compensates each rounding, and the descent over single weights all lower
the same error, against the damped Gram matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import ops
from ..layouts.nm_q4 import PATTERNS
from ..pattern import NM, Pattern
from .base import BlockMethod, LinearMethod, Method, PlannedBlock, Solution, Work
from .statistics import FeatureNorm, Gram, HasGram

INT4 = "int4"
VALUES = (None, INT4)
ITERATIONS = 4  # of the fit: what it leaves, the descent finds, whose target is the dense weight


@dataclass(frozen=True)
class FourBits(LinearMethod):
    """Another method, followed by rounding to 4 bits. `prune(..., values="int4")` makes it.

    Attributes:
        pruner: the method that chooses the mask.
        damping: share of the Gram matrix's mean diagonal that is added to its diagonal.
        passes: visits of each weight after the sweep.
    """

    name: ClassVar[str] = "int4"
    needs: ClassVar = Gram

    pruner: LinearMethod
    damping: float = 0.01
    passes: int = 3

    def settings(self) -> dict[str, object]:
        """Return the settings of the pruner, and those of the rounding."""
        return {**self.pruner.settings(), "values": INT4, "values_damping": self.damping, "values_passes": self.passes}

    @property
    def needs_whole_model(self) -> bool:
        return self.pruner.needs_whole_model

    def allocate(self, blocks: Sequence[PlannedBlock], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        chosen = self.pruner.allocate(blocks, patterns)
        for name, pattern in chosen.items():
            if not isinstance(pattern, NM) or (pattern.n, pattern.m) not in PATTERNS:
                raise ValueError(f"values: expected pattern 2:4, 1:4 or 4:16 with 'int4', got {pattern} for {name}")
        return chosen

    def work(self, rows: int, features: int) -> Work:
        """Return the work of the pruner, and of the fit, a sweep and the residual of the descent."""
        own = self.pruner.work(rows, features)
        return Work(own.shared + features**3 / 6, own.own + (ITERATIONS + 2.0) * rows * features**2)

    def solving_bytes(self, rows: int, features: int) -> int:
        """Return what the pruner takes, or if that is more what the rounding takes behind it."""
        own = 34 * rows * features + 8 * features**2  # measured: masks, the fit, the residual; the damped Gram matrix
        return max(self.pruner.solving_bytes(rows, features), own)

    def solve(self, weight: torch.Tensor, statistics: HasGram, pattern: Pattern) -> Solution:
        pruned = self.pruner.solve(weight, statistics, pattern).weight
        dense, mask = weight.float(), pruned != 0
        # Without the warning of rows that are not finished.
        fitted, _, _ = torch.ops.sparsekern.masked_lstsq(
            dense, statistics.gram, mask, start=pruned.float(), damping=self.damping, max_iterations=ITERATIONS
        )
        factor = statistics.factor(self.damping)
        scales = ops.q4_scales(fitted, factor.diagonal().clamp(min=0).square())  # of a dead feature it is negative
        found, _ = ops.obs_quantize(fitted, factor, mask, scales)
        hessian = ops.gram_symmetrize_(statistics.gram.clone())
        hessian.diagonal().add_(statistics.shift)
        ops.quantize_descent_(found, (found - dense) @ hessian, hessian, mask, scales, self.passes)
        new_weight = found.to(weight.dtype)
        error = statistics.row_energy(new_weight.float() - dense)
        return Solution(new_weight, error, (error - statistics.row_energy(fitted - dense)).clamp_(min=0))


def with_values(method: Method, values: str | None) -> Method:
    """Return `method`, or with `values="int4"` the same followed by rounding to 4 bits.

    Raises:
        ValueError: other values, or a method that cannot be followed by it.
    """
    if values not in VALUES:
        raise ValueError(f"values: expected 'int4' or None, got {values!r}")
    if values is None:
        return method
    if not isinstance(method, LinearMethod) or isinstance(method, BlockMethod) or method.needs not in (None, FeatureNorm, Gram):
        raise ValueError(
            f"values: expected None, or a method that solves one linear at a time from norms or a Gram matrix, got {method.name!r}"
        )
    return FourBits(method)
