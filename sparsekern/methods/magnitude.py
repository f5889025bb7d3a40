"""Magnitude pruning: prune the smallest weights. Needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from ..models import Linear
from ..pattern import NM, Pattern, Unstructured, share_with_zeros
from ._fields import choice
from .base import LinearMethod, PlannedBlock
from .selection import global_kept_counts, keep_mask
from .solution import Solution


@dataclass(frozen=True)
class Magnitude(LinearMethod):
    """Prune the weights of the smallest absolute value.

    With `scope="global"` one threshold holds for all linears that are pruned to the same sparsity. Of equal weights the earlier
    linear's is kept, then that of the lower index. N:M patterns ignore the scope.

    Example:
        >>> report = sparsekern.prune(model, sparsekern.Magnitude(scope="row"), 0.5, progress=False)
        >>> report.sparsity
        0.5

    Source: Han et al., Learning both weights and connections for efficient neural networks, 2015.
    """

    name: ClassVar[str] = "magnitude"

    scope: str = choice(
        "matrix",
        ("matrix", "row", "global"),
        help="where a sparsity is counted: over each matrix (the usual baseline), each row or all linears together",
    )

    @property
    def needs_whole_model(self) -> bool:
        return self.scope == "global"

    def allocate(self, blocks: Sequence[PlannedBlock], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        arranged = dict(patterns)
        if self.scope != "global":
            return arranged
        by_pattern: dict[Unstructured, list[Linear]] = {}
        for block in blocks:
            for linear in block.linears:
                if isinstance(pattern := patterns[linear.name], Unstructured):
                    by_pattern.setdefault(pattern, []).append(linear)
        for pattern, linears in by_pattern.items():
            arranged |= _shares(linears, pattern)
        return arranged

    def solves_rows_alone(self, pattern: Pattern) -> bool:
        return isinstance(pattern, NM) or self.scope == "row"

    def solve(self, weight: torch.Tensor, statistics: object, pattern: Pattern) -> Solution:
        return Solution(weight.masked_fill(~self.mask_of(weight, pattern), 0))

    def mask_of(self, weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """Return the mask, True where a weight is kept. A kept weight may be zero itself."""
        return keep_mask(_scores(weight), pattern, "row" if self.scope == "row" else "matrix")


def _scores(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().float()


def _shares(linears: Sequence[Linear], pattern: Unstructured) -> dict[str, Pattern]:
    """Return the sparsity of each linear that gives all of them together the sparsity of `pattern`."""
    kept = global_kept_counts([partial(_scores, linear.weight) for linear in linears], pattern.sparsity)
    shares: dict[str, Pattern] = {}
    for linear, count in zip(linears, kept, strict=True):
        total = linear.weight.numel()
        if not count:
            raise ValueError(
                f"Magnitude.scope='global': a sparsity of {pattern} leaves nothing of {linear.name}; ask for less, or for scope='matrix'"
            )
        shares[linear.name] = share_with_zeros(total - count, total)
    return shares
