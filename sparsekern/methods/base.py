"""What a pruning method is: a frozen config that solves one linear layer at a time from the statistics of its inputs."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch

from ..pattern import Pattern

StatisticKind = Literal["gram", "feature_norm"]


class Solution(NamedTuple):
    """A pruned weight matrix.

    `weight` `[out_features, in_features]` in the dtype it came in; `mask` bool of the same shape, True where kept; `row_error`
    `[out_features]` float64, the squared output error of each row over the calibration tokens (`d G d^T` with the undamped Gram
    matrix `G`, rounding to a half dtype included), or None where the method does not know it.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    row_error: torch.Tensor | None = None


class Statistics(Protocol):
    """What a method may ask of a linear layer's calibration inputs (see `sparsekern.pruning.statistics`)."""

    tokens: int

    @property
    def sum_squares(self) -> torch.Tensor:
        """`[in_features]` float32, over tokens; where the kind is `"gram"` this is its diagonal."""

    @property
    def gram(self) -> torch.Tensor:
        """`[in_features, in_features]` float32: `x^T x` over all tokens. Only the lower triangle is valid."""

    def factor(self, damping: float) -> torch.Tensor:
        """The reverse Cholesky factor of the damped Gram matrix; computed once, shared by all linears with the same input."""

    @property
    def shift(self) -> float:
        """What `factor` added to the diagonal: `factor factor^T = G + shift I`."""

    def row_energy(self, weight: torch.Tensor) -> torch.Tensor:
        """`[out_features]` float64: `w G w^T` of each row, that is its squared output over the calibration tokens."""

    @property
    def importance(self) -> torch.Tensor:
        """`[out_features, in_features]` float32: `|W| * (|Y|^T |X|)` of one linear, for a method that asks for `sensitivity`."""


class Method:
    """Base of the method configs. `statistic` says which statistic of the inputs `solve` needs (None: no data at all).

    `sensitivity` asks for each linear's own `importance` besides, which takes its outputs for every token.
    """

    name: ClassVar[str]
    statistic: ClassVar[StatisticKind | None]
    sensitivity: ClassVar[bool] = False

    def solve(self, weight: torch.Tensor, statistics: Statistics | None, pattern: Pattern) -> Solution:
        """Prune `weight` `[out_features, in_features]` to `pattern`; device-free mathematics, nothing is changed in place."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """The name and every field, as JSON can hold them."""
        return {"name": self.name, **asdict(self)}


def check_choice(argument: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
