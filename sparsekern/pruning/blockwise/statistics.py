"""What is kept of a linear layer's calibration inputs, and which linears may share it.

Linears that are fed the very same tensor (query, key and value; gate and up) need one Gram matrix and one factor between them.
Which ones these are is observed while the model runs; no table of names could know every model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ... import ops
from ...methods.base import StatisticKind
from ...models import Linear
from ...ops.reverse_cholesky import alive
from ..batches import Batch

BETWEEN_NAMES = "|"


class FeatureNorm:
    """Sum of squares of each input feature: all that Wanda needs."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self.sum_squares = torch.zeros(features, device=device)

    def add(self, x: torch.Tensor, row_mask: torch.Tensor | None, used: int | None = None) -> None:
        """Take in the rows of `x` `[tokens, features]` where `row_mask` is True (None: all); `used` is their number, if known.

        Raises:
            ValueError: NaN or Inf in a row that is used.
        """
        ops.feature_norm_(self.sum_squares, x, row_mask=row_mask)
        self.tokens += _rows(x, row_mask) if used is None else used

    @property
    def total(self) -> torch.Tensor:
        """What adds up over data sets."""
        return self.sum_squares

    def include(self, total: torch.Tensor) -> None:
        """Take in the `total` of earlier data sets."""
        self.sum_squares += total

    def clone(self) -> FeatureNorm:
        copy = FeatureNorm.__new__(FeatureNorm)
        copy.tokens, copy.sum_squares = self.tokens, self.sum_squares.clone()
        return copy


class Gram:
    """The Gram matrix `G = X^T X` of the inputs, and the factor of it that every linear with these inputs shares."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self._gram = torch.zeros(features, features, device=device)  # lower triangle
        self._factor: torch.Tensor | None = None
        self._damping = self._shift = 0.0

    def add(self, x: torch.Tensor, row_mask: torch.Tensor | None, used: int | None = None) -> None:
        """Take in the rows of `x` `[tokens, features]` where `row_mask` is True (None: all); `used` is their number, if known.

        Raises:
            ValueError: NaN or Inf in a row that is used.
        """
        ops.gram_(self._gram, x, row_mask=row_mask)
        self.tokens += _rows(x, row_mask) if used is None else used
        self._factor = None

    @property
    def total(self) -> torch.Tensor:
        """What adds up over data sets."""
        return self._gram

    def include(self, total: torch.Tensor) -> None:
        """Take in the `total` of earlier data sets."""
        self._gram += total
        self._factor = None

    def clone(self) -> Gram:
        copy = Gram.__new__(Gram)
        copy.tokens, copy._gram = self.tokens, self._gram.clone()
        copy._factor, copy._damping, copy._shift = None, 0.0, 0.0
        return copy

    @property
    def sum_squares(self) -> torch.Tensor:
        return self._gram.diagonal()

    @property
    def gram(self) -> torch.Tensor:
        return self._gram

    def factor(self, damping: float) -> torch.Tensor:
        if self._factor is None or self._damping != damping:
            self._factor, self._damping = ops.reverse_cholesky(self._gram, damping), damping
            # From the traces of `V V^T = G + shift I`, so that whatever damping the factorisation ended up with is included.
            trace = torch.linalg.vector_norm(self._factor, dtype=torch.float64) ** 2 - self.sum_squares.double().sum()
            self._shift = max(float(trace) / len(self._gram), 0.0)
        return self._factor

    def solve(self, cross: torch.Tensor, damping: float) -> torch.Tensor:
        factor, dead = alive(self.factor(damping))
        half_solved = torch.linalg.solve_triangular(factor.T, cross.masked_fill(dead, 0), upper=False, left=False)
        return torch.linalg.solve_triangular(factor, half_solved, upper=True, left=False)

    def empty(self) -> Gram:
        return Gram(len(self._gram), self._gram.device)

    @property
    def shift(self) -> float:
        self._any_factor()
        return self._shift

    def row_energy(self, weight: torch.Tensor) -> torch.Tensor:
        # `||w V||^2 - shift ||w||^2` is a sum of squares, where `w G w^T` cancels badly once a few features dominate the rest.
        damped = _square_norms(_product(weight, self._any_factor()))
        return (damped - self.shift * _square_norms(weight)).clamp_(min=0)

    def _any_factor(self) -> torch.Tensor:
        return self.factor(0.01) if self._factor is None else self._factor


def _product(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`weight @ factor` in float32; on a GPU to sixteen bits, which take a tenth of the time and are plenty for an error to report."""
    if not weight.is_cuda:
        return weight.float() @ factor
    return torch.mm(*bf16_pieces(weight, factor), out_dtype=torch.float32)


def bf16_pieces(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 matrices whose product is `a @ b` but for the products of the last eight of sixteen bits on either side.

    `(high + low) (high' + low')` without `low low'` is one product of the pieces side by side.
    """
    b_high, b_low = _split(b)
    if a.dtype == torch.bfloat16:
        return torch.cat((a, a), 1), torch.cat((b_high, b_low))
    a_high, a_low = _split(a)
    return torch.cat((a_high, a_high, a_low), 1), torch.cat((b_high, b_low, b_high))


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def _square_norms(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()


@dataclass(frozen=True)
class Sensitivity:
    """A linear's own `importance` (see `ops.sensitivity_`) beside what is kept of its inputs."""

    inputs: FeatureNorm | Gram
    importance: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.inputs.tokens

    @property
    def sum_squares(self) -> torch.Tensor:
        return self.inputs.sum_squares


STATISTICS: dict[StatisticKind, Callable[[int, torch.device], FeatureNorm | Gram]] = {"feature_norm": FeatureNorm, "gram": Gram}


class SharedStatistics:
    """One statistic for each set of linears that have had the same inputs in every batch so far.

    Linears with equally many features start in one set; a batch that feeds them different tensors splits the set, and each part
    goes on from a copy of what they had in common. With `sensitivity`, each linear's importance is added up besides.
    """

    def __init__(self, linears: Iterable[Linear], kind: StatisticKind, sensitivity: bool = False) -> None:
        by_features: dict[int, list[Linear]] = {}
        self._importance: dict[str, torch.Tensor] = {}
        for linear in linears:
            by_features.setdefault(linear.features, []).append(linear)
            if sensitivity:
                self._importance[linear.name] = torch.zeros_like(linear.weight, dtype=torch.float32)
        make = STATISTICS[kind]
        self.groups = [(members, make(width, members[0].weight.device)) for width, members in by_features.items()]

    def add(self, batch: Batch, inputs: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Take in one batch: for each linear's name, the tensors `[..., features]` that it was called with.

        Raises:
            ValueError: NaN or Inf in an input, naming the linear and the calibration sample.
        """
        self._split(lambda linear: tuple(map(_identity, inputs[linear.name])))
        for members, statistic in self.groups:
            for x in inputs[members[0].name]:
                _add_input(statistic, members[0].name, x, batch)
                for linear in members if self._importance else ():
                    _add_sensitivity(self._importance[linear.name], linear, *batch.flatten(x))

    def totals(self) -> dict[str, torch.Tensor]:
        """What adds up over data sets, under the names of the linears that it is of."""
        return {BETWEEN_NAMES.join(linear.name for linear in members): statistic.total for members, statistic in self.groups}

    def include(self, totals: Mapping[str, torch.Tensor]) -> None:
        """Take in the `totals` of earlier data sets."""
        owner = {name: names for names in totals for name in names.split(BETWEEN_NAMES)}
        self._split(lambda linear: owner[linear.name])
        for members, statistic in self.groups:
            total = totals[owner[members[0].name]]
            statistic.include(total.to(members[0].weight.device))

    def _split(self, key: Callable[[Linear], Hashable]) -> None:
        """Leave only linears of the same `key` in one set."""
        refined = []
        for members, statistic in self.groups:
            parts: dict[Hashable, list[Linear]] = {}
            for linear in members:
                parts.setdefault(key(linear), []).append(linear)
            statistics = [statistic] + [statistic.clone() for _ in range(len(parts) - 1)]
            refined += zip(parts.values(), statistics, strict=True)
        self.groups = refined

    def of(self, linear: Linear, statistic: FeatureNorm | Gram) -> FeatureNorm | Gram | Sensitivity:
        """What a method may ask of `linear`, where `statistic` is that of its group."""
        return Sensitivity(statistic, self._importance[linear.name]) if self._importance else statistic


def _add_input(statistic: FeatureNorm | Gram, name: str, x: torch.Tensor, batch: Batch) -> None:
    try:
        rows, row_mask = batch.flatten(x)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    try:
        statistic.add(rows, row_mask, None if row_mask is None else batch.used(len(rows)))
    except ValueError as error:
        raise _named(error, name, rows, row_mask, batch) from error


def _add_sensitivity(importance: torch.Tensor, linear: Linear, rows: torch.Tensor, row_mask: torch.Tensor | None) -> None:
    try:
        ops.sensitivity_(importance, linear.weight, rows, row_mask=row_mask)
    except ValueError as error:
        raise ValueError(f"{linear.name}: {error}") from error


def _named(error: ValueError, name: str, rows: torch.Tensor, row_mask: torch.Tensor | None, batch: Batch) -> ValueError:
    bad = ~torch.isfinite(rows).all(1)
    if row_mask is not None:
        bad &= row_mask
    if not bad.any():
        return ValueError(f"{name}: {error}")
    row = int(bad.nonzero()[0])
    value = float(rows[row][~torch.isfinite(rows[row])][0])
    sample = batch.sample_of_row(row, len(rows))
    where = "an unknown calibration sample" if sample is None else f"calibration sample {sample}"
    return ValueError(
        f"{name}: its input is {value} in {where} (row {row} of the batch); no damping can help. "
        "Leave that sample out, or run the model in float32 or bfloat16 if float16 overflowed"
    )


def _identity(x: torch.Tensor) -> tuple:
    """Equal for two tensors, both alive, only if they are the same values in the same memory."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def _rows(x: torch.Tensor, row_mask: torch.Tensor | None) -> int:
    return len(x) if row_mask is None else int(row_mask.sum())
