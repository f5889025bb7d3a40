"""SparseGPT: prune column by column, and let the weights not yet visited compensate for each removal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import ops
from ..pattern import NM, Pattern, Unstructured, pruned_count
from ._fields import choice, flag, number, whole
from .base import LinearMethod
from .existing_zeros import best_of_matrix, sweep_keeping_zeros, sweep_tiles
from .magnitude import Magnitude
from .solution import Solution, Team
from .statistics import Gram, HasGram, square_norms
from .together import Staging, energies_together, factor_together, shifts_of, stacked
from .wanda import Wanda

COPIED_BYTES = 2**27  # of Gram matrices that are copied next to one another for one call
MOST_COPIED_BYTES = 2**29  # the same, where fewer matrices would leave threads without one
WIDEST_SHARED = 768  # features: all threads of a CPU solve wider matrices one after another, since one for each leaves the caches


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
    keep_zeros: bool = flag(
        True, help="leave zeros of the weight zero, as the first that are pruned; False compensates in them too"
    )

    def solves_rows_alone(self, pattern: Pattern) -> bool:
        if isinstance(pattern, NM) or self.mask == "wanda":
            return True
        return self.mask is None and self.scope == "row"

    def solves_tiles(self, pattern: Pattern) -> bool:
        return not self.solves_rows_alone(pattern)

    def solve_tiles(
        self, weight: torch.Tensor, tiles: Sequence[slice], statistics: HasGram, pattern: Pattern, team: Team
    ) -> Solution:
        assert isinstance(pattern, Unstructured)  # see `solves_tiles`
        factor = statistics.factor(self.damping)
        zero = weight == 0 if self.keep_zeros else torch.zeros_like(weight, dtype=torch.bool)
        if self.mask is not None or self.scope == "matrix":
            mask = self._fixed_mask(weight, statistics, pattern)
            if mask is None:
                mask = best_of_matrix(weight, factor, pattern.sparsity, zero)
            swept = [ops.obs_sweep(weight[tile], factor, mask=mask[tile])[::2] for tile in tiles]
            new_weight, damped_error = (torch.cat(parts) for parts in zip((weight[:0], factor.new_empty(0)), *swept, strict=True))
        else:
            new_weight, damped_error = sweep_tiles(weight, tiles, factor, pattern.sparsity, self.block_size, zero, team)
        row_error, begin = damped_error.double(), tiles[0].start if tiles else 0
        for tile in tiles:
            own = slice(tile.start - begin, tile.stop - begin)
            row_error[own] = self._row_error(weight[tile], new_weight[own], damped_error[own], statistics)
        return Solution(new_weight, row_error)

    def solve(self, weight: torch.Tensor, statistics: HasGram, pattern: Pattern) -> Solution:
        factor = statistics.factor(self.damping)
        new_weight, damped_error = self._sweep(weight, factor, pattern, self._fixed_mask(weight, statistics, pattern))
        return Solution(new_weight, self._row_error(weight, new_weight, damped_error, statistics))

    @staticmethod
    def _row_error(weight: torch.Tensor, new_weight: torch.Tensor, damped_error: torch.Tensor, statistics: HasGram) -> torch.Tensor:
        delta = new_weight.float() - weight.float()
        if weight.dtype == torch.float32:
            row_error = damped_error.double() - statistics.shift * square_norms(delta)
        else:  # the sweep's own error does not include the rounding to a half dtype
            row_error = statistics.row_energy(delta)
        return row_error.clamp_(min=0)

    def solve_many(
        self,
        weights: Sequence[torch.Tensor],
        statistics: Sequence[HasGram],
        pattern: Pattern,
        about: Callable[[int], AbstractContextManager[object]] = nullcontext,
    ) -> list[Solution]:
        """Return what `solve` returns for each weight. Factors and sweeps are one call for many weights.

        Of float32 weights, the errors of `solve` differ in the last bits.
        """
        first = weights[0] if len(weights) else None
        if first is not None and not first.is_cuda and first.shape[1] > WIDEST_SHARED:
            return super().solve_many(weights, statistics, pattern, about)
        found: dict[int, Solution] = {}
        staging = Staging()
        try:
            for indices in _calls(statistics):
                found |= self._solve_together(indices, weights, statistics, pattern, about, staging)
        except ValueError:  # the weight that it is about raises it again, in its own context
            return super().solve_many(weights, statistics, pattern, about)
        return [found[index] for index in range(len(found))]

    def _solve_together(
        self,
        indices: Sequence[int],
        weights: Sequence[torch.Tensor],
        statistics: Sequence[HasGram],
        pattern: Pattern,
        about: Callable[[int], AbstractContextManager[object]],
        staging: Staging,
    ) -> dict[int, Solution]:
        own = [statistics[index] for index in indices]
        factors = factor_together(own, self.damping, lambda place: about(indices[place]), staging)
        weight = stacked([weights[index] for index in indices])
        masks = [self._fixed_mask(*pair, pattern) for pair in zip(weight, own, strict=True)]
        mask = None if self.mask is None else torch.stack([fixed for fixed in masks if fixed is not None])
        new_weight, damped_error = self._sweep(weight, factors, pattern, mask)
        delta = new_weight.float() - weight.float()
        if weight.dtype == torch.float32:
            row_error = damped_error.double() - shifts_of(own).to(delta.device) * square_norms(delta)
        else:
            row_error = energies_together(own, delta)
        return {index: Solution(*solved) for index, *solved in zip(indices, new_weight, row_error.clamp_(min=0), strict=True)}

    def _sweep(
        self, weight: torch.Tensor, factor: torch.Tensor, pattern: Pattern, fixed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new weight and the damped error of each row; all may be batches."""
        options: dict[str, Any] = {"scope": self.scope, "block_size": self.block_size}
        if fixed is not None:
            return ops.obs_sweep(weight, factor, mask=fixed, **options)[::2]
        if not self.keep_zeros or weight.all():
            return ops.obs_sweep(weight, factor, pattern, **options)[::2]
        if weight.dim() == 2 or (isinstance(pattern, NM) and not weight.is_cuda):
            return sweep_keeping_zeros(weight, factor, pattern, **options)
        swept = [sweep_keeping_zeros(*own, pattern, **options) for own in zip(weight, factor, strict=True)]
        return torch.stack([new for new, _ in swept]), torch.stack([error for _, error in swept])

    def _fixed_mask(self, weight: torch.Tensor, statistics: HasGram, pattern: Pattern) -> torch.Tensor | None:
        if self.mask is None:
            return None
        if self.mask == "zeros":
            return _existing_zeros(weight, pattern)
        mask = Magnitude().mask_of(weight, pattern) if self.mask == "magnitude" else Wanda().mask_of(weight, statistics, pattern)
        return mask & (weight != 0) if self.keep_zeros else mask


def _calls(statistics: Sequence[HasGram]) -> Iterator[list[int]]:
    """Yield the indices that are solved together: no statistic twice, and as many as the memory for copies of matrices allows."""
    turns: dict[int, list[int]] = {}
    seen: dict[int, int] = {}
    for index, own in enumerate(statistics):
        turn = seen.get(id(own), 0)
        seen[id(own)] = turn + 1
        turns.setdefault(turn, []).append(index)
    for indices in turns.values():
        size, threads = max(4 * statistics[indices[0]].sum_squares.numel() ** 2, 1), torch.get_num_threads()
        most = max(COPIED_BYTES // size, min(threads, MOST_COPIED_BYTES // size), 1)
        if most > threads:
            most -= most % threads  # each thread solves as many
        yield from (indices[begin : begin + most] for begin in range(0, len(indices), most))


def _existing_zeros(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    mask = weight != 0
    if isinstance(pattern, NM):
        made_up = bool((mask.unflatten(1, (-1, pattern.m)).sum(2) <= pattern.n).all())
    else:
        made_up = int((~mask).sum()) >= pruned_count(mask.numel(), pattern.sparsity)
    if not made_up:
        raise ValueError(f"SparseGPT.mask='zeros': the weight's zeros do not make up the pattern {pattern}")
    return mask
