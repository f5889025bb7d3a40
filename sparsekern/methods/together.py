"""Several linears solved in one call instead of one each: of one shape, such as the experts of a block, or with the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from ..ops.reverse_cholesky import factor_quietly, report_departure
from ..pattern import Pattern
from .base import LinearMethod
from .solution import Solution
from .statistics import ENERGY_COLUMNS, Gram, HasGram, Statistic, damped_energy, square_norms


def factor_together(
    statistics: Sequence[HasGram], damping: float, about: Callable[[int], AbstractContextManager[object]], staging: Staging
) -> torch.Tensor:
    """Return the factors of the damped Gram matrices, `[len(statistics), features, features]`, and cache them.

    Args:
        statistics: Gram matrices of one size, none of them twice.
        damping: as in `ops.reverse_cholesky`.
        about: makes the context in which a warning about statistic `i` is given.
        staging: memory for copies of the Gram matrices.
    """
    missing = {index: own for index, own in enumerate(statistics) if isinstance(own, Gram) and not own.has_factor(damping)}
    if len(missing) > 1:
        factors, used = factor_quietly(staging.stacked([own.gram for own in missing.values()]), damping)
        for (index, own), factor, own_used in zip(missing.items(), factors, used, strict=True):
            own.keep_factor(factor, damping, float(own_used))
            with about(index):
                report_departure(damping, own_used)
    found = []
    for index, known in enumerate(statistics):
        with about(index):
            found.append(known.factor(damping))
    return stacked(found)


def solve_rows_together(
    method: LinearMethod,
    weights: Sequence[torch.Tensor],
    statistics: Sequence[Statistic],
    pattern: Pattern,
    about: Callable[[int], AbstractContextManager[object]],
) -> list[Solution]:
    """Return what `method.solve` returns for each weight, from one call for the rows of all of them.

    Args:
        method: a method whose `solves_rows_alone` holds for the pattern.
        weights: `[out_features, in_features]` each, of one dtype. Their numbers of rows may differ.
        statistics: the same instance for each weight.
        pattern: the pattern to prune to.
        about: makes the context in which weight `i` is solved, see `LinearMethod.solve_many`. Warnings are given in that of the first.
    """
    try:
        with about(0):
            whole = method.solve(torch.cat(list(weights)), statistics[0], pattern)
    except ValueError:  # the weight that it is about raises it again, in its own context
        return LinearMethod.solve_many(method, weights, statistics, pattern, about)
    rows = [len(weight) for weight in weights]
    parts = [[None] * len(rows) if part is None else part.split(rows) for part in whole]
    return [Solution(weight.clone(), *errors) for weight, *errors in zip(*parts, strict=True)]  # no memory in common, to be saved


def energies_together(statistics: Sequence[HasGram], rows: torch.Tensor) -> torch.Tensor:
    """Return what `row_energy(rows[i])` of each statistic `i` returns, `[len(statistics), out_features]` float64."""
    grams = [own for own in statistics if isinstance(own, Gram)]
    if rows.is_cuda or rows.shape[-1] > ENERGY_COLUMNS or len(grams) < len(statistics):
        return torch.stack([own.row_energy(own_rows) for own, own_rows in zip(statistics, rows, strict=True)])
    energy = damped_energy(rows, stacked([own.any_factor() for own in grams]))
    return (energy - shifts_of(grams).to(rows.device) * square_norms(rows)).clamp_(min=0)


def shifts_of(statistics: Sequence[HasGram]) -> torch.Tensor:
    """Return the `shift` of each statistic, `[len(statistics), 1]` float64, on the CPU."""
    return torch.tensor([[own.shift] for own in statistics], dtype=torch.float64)


class Staging:
    """Memory in which matrices are put next to one another, which each call uses again: new memory costs as much as the copy."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def stacked(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what `stacked` returns; a copy is valid until the next call."""
        found = _neighbours(matrices)
        if found is not None:
            return found
        if self._memory is None or len(self._memory) < len(matrices):
            self._memory = matrices[0].new_empty((len(matrices), *matrices[0].shape))
        return torch.stack(list(matrices), out=self._memory[: len(matrices)])


def stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return matrices of one shape and dtype as a batch, without a copy where they follow one another in memory."""
    found = _neighbours(matrices)
    return torch.stack(list(matrices)) if found is None else found


def _neighbours(matrices: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return matrices that follow one another in memory as a batch, or None if they do not."""
    first, size = matrices[0], matrices[0].numel()
    follow = all(
        matrix.is_contiguous()
        and matrix.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and matrix.storage_offset() == first.storage_offset() + index * size
        for index, matrix in enumerate(matrices)
    )
    return first.as_strided((len(matrices), *first.shape), (size, *first.stride())) if follow else None
