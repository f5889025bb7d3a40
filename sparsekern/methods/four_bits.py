"""Values of 4 bits: what a method left of a weight, rounded to multiples of a scale for each row and 64 columns.

The mask is the method's. Its least squares, the scales, the sweep that compensates each rounding, and the descent over single weights all
lower the same error, against the damped Gram matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import ops
from ..layouts.nm_q4 import COLUMNS, PATTERNS, nearest_multiple
from ..pattern import NM, Pattern
from .base import BlockMethod, LinearMethod, Method, PlannedBlock, Solution, Work
from .statistics import FeatureNorm, Gram, HasGram

INT4 = "int4"
VALUES = (None, INT4)
STEPS = 24  # scales that are tried, from the one at which the largest weight is -8 steps down to half of it
ROWS_TOGETHER = 64  # whose scales are searched at once, so that they stay in the cache


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
        """Return the work of the pruner, and of a fit of some twenty iterations, a sweep and the residual of the descent."""
        own = self.pruner.work(rows, features)
        return Work(own.shared + features**3 / 6, own.own + 22.0 * rows * features**2)

    def solve(self, weight: torch.Tensor, statistics: HasGram, pattern: Pattern) -> Solution:
        pruned = self.pruner.solve(weight, statistics, pattern).weight
        dense, mask = weight.float(), pruned != 0
        fitted, _ = ops.masked_lstsq(dense, statistics.gram, mask, start=pruned.float(), damping=self.damping)
        factor = statistics.factor(self.damping)
        scales = search_scales(fitted, factor.diagonal().clamp(min=0).square())  # of a dead feature it is negative
        found, _ = ops.obs_quantize(fitted, factor, mask, scales)
        hessian = ops.gram_symmetrize_(statistics.gram.clone())
        hessian.diagonal().add_(statistics.shift)
        ops.quantize_descent_(found, (found - fitted) @ hessian, hessian, mask, scales, self.passes)
        new_weight = found.to(weight.dtype)
        return Solution(
            new_weight,
            statistics.row_energy(new_weight.float() - dense).clamp_(min=0),
            statistics.row_energy(new_weight.float() - fitted).clamp_(min=0),
        )


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


def search_scales(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Return the scales with the smallest weighted error of rounding each weight to the nearest multiple.

    At the largest of the scales tried, the largest weight of a group is -8 steps; at the smallest, it is cut off at half of that.

    Args:
        weight: `[rows, columns]` float32; zeros cost nothing.
        importance: `[columns]` float32, the weight of each column's squared error.

    Returns:
        `[rows, ceil(columns / 64)]` float16. A group without a weight has scale 0.

    Raises:
        ValueError: a weight too large for a float16 scale.
    """
    rows, columns = weight.shape
    fill = -columns % COLUMNS
    largest = 8 * torch.finfo(torch.float16).max
    if weight.numel() and float(weight.abs().max()) > largest:
        raise ValueError(f"weight: expected magnitudes up to {largest:,.0f}, which 4 bits and a float16 scale hold")
    groups = torch.nn.functional.pad(weight, (0, fill)).view(rows, -1, COLUMNS)
    costs = torch.nn.functional.pad(importance, (0, fill)).view(-1, COLUMNS)
    found = torch.empty(rows, groups.shape[1], dtype=torch.float16, device=weight.device)
    for own, out in zip(groups.split(ROWS_TOGETHER), found.split(ROWS_TOGETHER), strict=True):
        extreme = own.gather(-1, own.abs().argmax(-1, keepdim=True))
        least = torch.full_like(extreme, torch.inf)
        best = torch.zeros_like(extreme)
        for step in range(STEPS):
            scale = (extreme / -8 * (1 - step / (2 * (STEPS - 1)))).half().float()
            cost = ((own - nearest_multiple(own, scale)).square_() * costs).sum(-1, keepdim=True)
            best, least = torch.where(cost < least, scale, best), torch.minimum(cost, least)
        out.copy_(best.squeeze(-1))
    return found
