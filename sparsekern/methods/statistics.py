"""Statistics of a linear's calibration inputs. A method's `needs` names one of them.

`FeatureNorm` and `Gram` describe inputs, so linears with the same inputs share one. `SampleImportance` and `GramImportance` describe
one weight together with its inputs. Each has a `total`, which adds up over datasets: `include` adds the total of earlier ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from .. import ops
from ..backends.products import full_float32
from ..ops.reverse_cholesky import alive

ENERGY_COLUMNS = 256  # columns of a factor multiplied at a time by `row_energy`


class HasNorms(Protocol):
    """Statistics of a linear's calibration inputs that know the norm of each feature."""

    @property
    def tokens(self) -> int:
        """The number of calibration tokens."""

    @property
    def sum_squares(self) -> torch.Tensor:
        """`[in_features]` float32, over tokens; the diagonal of the Gram matrix."""


class HasGram(HasNorms, Protocol):
    """Statistics that know the Gram matrix of the inputs."""

    @property
    def gram(self) -> torch.Tensor:
        """`[in_features, in_features]` float32: `x^T x` over all tokens. Only the lower triangle is valid."""

    def factor(self, damping: float) -> torch.Tensor:
        """Return the reverse Cholesky factor of the damped Gram matrix, which all linears with the same inputs share."""

    @property
    def shift(self) -> float:
        """The number that `factor` added to the diagonal: `factor factor^T = G + shift I`."""

    def solve(self, cross: torch.Tensor, damping: float) -> torch.Tensor:
        """Return the `W` of `W (G + shift I) = cross`; it is zero at features that were never active."""

    def empty(self) -> HasGram:
        """Return statistics of the same width that have seen no token."""

    def add(self, x: torch.Tensor, row_mask: torch.Tensor | None) -> None:
        """Add the rows of `x` `[tokens, in_features]` where `row_mask` is True, or all where it is None."""

    def row_energy(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `w G w^T` of each row, `[out_features]` float64: its squared output over the calibration tokens."""


class HasImportance(HasNorms, Protocol):
    """Statistics that measure how strongly the output reacts to each weight."""

    @property
    def importance(self) -> torch.Tensor:
        """`[out_features, in_features]` float32, over all datasets so far."""


class FeatureNorm:
    """The sum of squares of each input feature."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self.sum_squares = torch.zeros(features, dtype=torch.float32, device=device)

    def add(self, x: torch.Tensor, row_mask: torch.Tensor | None, used: int | None = None) -> None:
        """Add the rows of `x` `[tokens, features]`.

        Args:
            x: inputs of the linear.
            row_mask: True at the rows to use; None uses all.
            used: the number of these rows, where the caller knows it.

        Raises:
            ValueError: NaN or Inf in a row that is used.
        """
        ops.feature_norm_(self.sum_squares, x, row_mask=row_mask)
        self.tokens += _rows(x, row_mask) if used is None else used

    @property
    def total(self) -> torch.Tensor:
        """The tensor that adds up over datasets."""
        return self.sum_squares

    def include(self, total: torch.Tensor) -> None:
        """Add the `total` of earlier datasets."""
        self.sum_squares += total

    def clone(self) -> FeatureNorm:
        """Return a copy that goes on independently."""
        copy = FeatureNorm(0, self.sum_squares.device)
        copy.tokens, copy.sum_squares = self.tokens, self.sum_squares.clone()
        return copy


class Gram:
    """The Gram matrix `G = X^T X` of the inputs, and its factor, which all linears with these inputs share."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self._gram = torch.zeros(features, features, dtype=torch.float32, device=device)  # lower triangle
        self._factor: torch.Tensor | None = None
        self._damping = self._shift = 0.0

    def add(self, x: torch.Tensor, row_mask: torch.Tensor | None, used: int | None = None) -> None:
        """Add the rows of `x` `[tokens, features]`.

        Args:
            x: inputs of the linear.
            row_mask: True at the rows to use; None uses all.
            used: the number of these rows, where the caller knows it.

        Raises:
            ValueError: NaN or Inf in a row that is used.
        """
        ops.gram_(self._gram, x, row_mask=row_mask)
        self.tokens += _rows(x, row_mask) if used is None else used
        self._factor = None

    @property
    def total(self) -> torch.Tensor:
        """The tensor that adds up over datasets."""
        return self._gram

    def include(self, total: torch.Tensor) -> None:
        """Add the `total` of earlier datasets."""
        self._gram += total
        self._factor = None

    def clone(self) -> Gram:
        """Return a copy that goes on independently, without the factor."""
        copy = Gram(0, self._gram.device)
        copy.tokens, copy._gram = self.tokens, self._gram.clone()
        return copy

    @property
    def sum_squares(self) -> torch.Tensor:
        """`[features]` float32: the diagonal."""
        return self._gram.diagonal()

    @property
    def gram(self) -> torch.Tensor:
        """`[features, features]` float32; only the lower triangle is valid."""
        return self._gram

    def factor(self, damping: float) -> torch.Tensor:
        """Return the reverse Cholesky factor of the damped Gram matrix, which is cached for the next call with this damping."""
        if self._factor is None or not self.has_factor(damping):
            self._factor, self._damping = ops.reverse_cholesky(self._gram, damping), damping
            # From the traces of `V V^T = G + shift I`, since the factorisation may have raised the damping.
            trace = torch.linalg.vector_norm(self._factor, dtype=torch.float64) ** 2 - self.sum_squares.double().sum()
            self._shift = max(float(trace) / len(self._gram), 0.0)
        return self._factor

    def has_factor(self, damping: float) -> bool:
        """Return whether `factor(damping)` has been computed."""
        return self._factor is not None and self._damping == damping

    def keep_factor(self, factor: torch.Tensor, damping: float, used: float) -> None:
        """Take `factor` for that of `damping`, computed with damping `used`, in the convention of `ops.reverse_cholesky.reference`."""
        self._factor, self._damping = factor, damping
        share = 0.0 if used == -math.inf else abs(used)
        self._shift = share * float(self.sum_squares.double().mean())

    @property
    def damping(self) -> float:
        """The damping of the factor that was computed last."""
        return self._damping

    def take_factor(self, factor: torch.Tensor, damping: float, shift: float) -> None:
        """Take the factor of another process, with its `damping` and `shift`, for one that `factor` has computed."""
        self._factor, self._damping, self._shift = factor, damping, shift

    @full_float32()
    def solve(self, cross: torch.Tensor, damping: float) -> torch.Tensor:
        """Return the `W` of `W (G + shift I) = cross`; it is zero at features that were never active."""
        factor, dead = alive(self.factor(damping))
        half_solved = torch.linalg.solve_triangular(factor.T, cross.masked_fill(dead, 0), upper=False, left=False)
        return torch.linalg.solve_triangular(factor, half_solved, upper=True, left=False)

    def empty(self) -> Gram:
        """Return a Gram matrix of the same width that has seen no token."""
        return Gram(len(self._gram), self._gram.device)

    @property
    def shift(self) -> float:
        """The number that `factor` added to the diagonal: `factor factor^T = G + shift I`."""
        self.any_factor()
        return self._shift

    def row_energy(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `w G w^T` of each row of `weight`, `[out_features]` float64."""
        # `||w V||^2 - shift ||w||^2` is a sum of squares, where `w G w^T` cancels badly once a few features dominate the rest.
        damped = damped_energy(weight, self.any_factor())
        return (damped - self.shift * square_norms(weight)).clamp_(min=0)

    def any_factor(self) -> torch.Tensor:
        """Return a factor that has been computed, or that of the usual damping."""
        return self.factor(0.01) if self._factor is None else self._factor


class Importance(ABC):
    """Base of the statistics of one weight together with its inputs.

    Attributes:
        INPUTS: the least class of `inputs`.
        SEES_TOKENS: True if `add` must see each batch; False if the importance follows from `inputs` alone.
        weight: `[out_features, features]`.
        inputs: the statistic of the weight's inputs.
    """

    INPUTS: ClassVar[type[FeatureNorm] | type[Gram]]
    SEES_TOKENS: ClassVar[bool]

    def __init__(self, weight: torch.Tensor, inputs: HasNorms) -> None:
        self.weight, self.inputs = weight, inputs

    @property
    def tokens(self) -> int:
        """The number of tokens seen in this dataset."""
        return self.inputs.tokens

    @property
    def sum_squares(self) -> torch.Tensor:
        """`[features]` float32, over the tokens of this dataset."""
        return self.inputs.sum_squares

    @property
    @abstractmethod
    def importance(self) -> torch.Tensor:
        """`[out_features, features]` float32, over this dataset and those included."""

    @property
    def total(self) -> torch.Tensor:
        """The tensor that adds up over datasets."""
        return self.importance

    @abstractmethod
    def add(self, x: torch.Tensor, row_mask: torch.Tensor | None) -> None:
        """Add the rows of `x` `[tokens, features]` where `row_mask` is True, or all where it is None."""

    @abstractmethod
    def include(self, total: torch.Tensor) -> None:
        """Add the `total` of earlier datasets."""


class SampleImportance(Importance):
    """`|W| * (|Y|^T |X|)`: the absolute gradient of each token, summed over tokens (see `ops.sensitivity_`)."""

    INPUTS = FeatureNorm
    SEES_TOKENS = True

    def __init__(self, weight: torch.Tensor, inputs: HasNorms) -> None:
        super().__init__(weight, inputs)
        self._importance = torch.zeros_like(weight, dtype=torch.float32)

    @property
    def importance(self) -> torch.Tensor:
        return self._importance

    def add(self, x: torch.Tensor, row_mask: torch.Tensor | None) -> None:
        ops.sensitivity_(self._importance, self.weight, x, row_mask=row_mask)

    def include(self, total: torch.Tensor) -> None:
        self._importance += total


class GramImportance(Importance):
    """`|W * (W G)|`: the absolute gradient of a whole dataset."""

    INPUTS = Gram
    SEES_TOKENS = False
    inputs: HasGram

    def __init__(self, weight: torch.Tensor, inputs: HasGram) -> None:
        super().__init__(weight, inputs)
        self._importance: torch.Tensor | None = None

    @property
    @full_float32()
    def importance(self) -> torch.Tensor:
        if self._importance is None:
            gram, weight = ops.gram_symmetrize_(self.inputs.gram.clone()), self.weight.float()
            self._importance = (weight @ gram).mul_(weight).abs_()
        return self._importance

    def add(self, x: torch.Tensor, row_mask: torch.Tensor | None) -> None:
        """Discard the cached importance. The rows are added to `inputs`."""
        self._importance = None

    def include(self, total: torch.Tensor) -> None:
        self._importance = self.importance + total


InputStatistic = FeatureNorm | Gram
Statistic = FeatureNorm | Gram | Importance


def inputs_of(needs: type[Statistic]) -> type[InputStatistic]:
    """Return the class of the statistic that linears with the same inputs share, for a method with these `needs`."""
    return needs.INPUTS if issubclass(needs, Importance) else needs


@full_float32()
def damped_energy(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return `||row factor||^2` of each row, float64; both arguments may be batches. Zeros below the diagonal are left out."""
    features = factor.shape[-1]
    found = torch.zeros(rows.shape[:-1], dtype=torch.float64, device=rows.device)
    rows = rows if rows.is_cuda else rows.float()
    for begin in range(0, features, ENERGY_COLUMNS):
        end = min(begin + ENERGY_COLUMNS, features)
        found += square_norms(_product(rows[..., :end], factor[..., :end, begin:end]))
    return found


def _product(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return `rows @ factor` in float32. On a GPU it is exact to sixteen bits, which suffice for an error and take less time."""
    if not rows.is_cuda:
        return rows @ factor
    return torch.mm(*bf16_pieces(rows, factor), out_dtype=torch.float32)


def bf16_pieces(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two bfloat16 matrices whose product is nearly `a @ b`.

    Each side is split into a high and a low piece of eight bits. `(high + low) (high' + low')` without `low low'` is one product
    of the pieces side by side.
    """
    b_high, b_low = _split(b)
    if a.dtype == torch.bfloat16:
        return torch.cat((a, a), 1), torch.cat((b_high, b_low))
    a_high, a_low = _split(a)
    return torch.cat((a_high, a_high, a_low), 1), torch.cat((b_high, b_low, b_high))


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def square_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of each row, float64."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).square()


def _rows(x: torch.Tensor, row_mask: torch.Tensor | None) -> int:
    return len(x) if row_mask is None else int(row_mask.sum())


@dataclass(frozen=True)
class ExpertSums:
    """Sums over the tokens that are routed to each expert of a layer.

    Attributes:
        tokens: their number, `[experts]` int64.
        weighted: sum of the routing weight times the norm of the output, `[experts]` float64.
        norms: sum of the norm of the output, `[experts]` float64.
        squares: sum of the squared norm of the output, `[experts]` float64.
    """

    tokens: torch.Tensor
    weighted: torch.Tensor
    norms: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def zeros(cls, experts: int, device: torch.device) -> ExpertSums:
        """Return sums over no tokens."""
        floats = torch.zeros(3, experts, dtype=torch.float64, device=device)
        return cls(torch.zeros(experts, dtype=torch.int64, device=device), *floats)

    def plus(self, others: ExpertSums) -> ExpertSums:
        """Return the sums over the tokens of both."""
        return ExpertSums(*(own + other for own, other in zip(vars(self).values(), vars(others).values(), strict=True)))

    def add(self, expert: int, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens routed to an expert.

        Args:
            expert: the number of the expert.
            outputs: its outputs, `[tokens, hidden]`, before the routing weights scale them.
            weights: the routing weights, `[tokens]`.
        """
        norms = torch.linalg.vector_norm(outputs, dim=1, dtype=torch.float64)
        self.tokens[expert] += len(norms)
        self.weighted[expert] += (norms * weights.double()).sum()
        self.norms[expert] += norms.sum()
        self.squares[expert] += norms.square().sum()
