"""What a pruning method is: a frozen config that solves one linear layer at a time from the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import nn

from ..models import Linear
from ..pattern import Pattern
from ._fields import Settings
from ._fields import check_choice as check_choice

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
    """What a method may ask of a linear layer's calibration inputs (see `sparsekern.pruning.blockwise.statistics`)."""

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

    def solve(self, cross: torch.Tensor, damping: float) -> torch.Tensor:
        """`W` of `W (G + shift I) = cross`, by the factor of that damping; zero where a feature was never active."""

    def empty(self) -> Statistics:
        """A statistic of the same kind and width that has seen no token."""

    def add(self, x: torch.Tensor, row_mask: torch.Tensor | None) -> None:
        """Take in the rows of `x` `[tokens, in_features]`, where `row_mask` is True or all."""

    def row_energy(self, weight: torch.Tensor) -> torch.Tensor:
        """`[out_features]` float64: `w G w^T` of each row, that is its squared output over the calibration tokens."""

    @property
    def importance(self) -> torch.Tensor:
        """`[out_features, in_features]` float32: `|W| * (|Y|^T |X|)` of one linear, for a method that asks for `sensitivity`."""


class Method(Settings):
    """Base of the method configs. `statistic` says which statistic of the inputs `solve` needs (None: no data at all).

    `trains` says whether it trains the model on the calibration ids, `whole_model` whether it works on all of it at once, not block by
    block. `sensitivity` asks for each linear's own `importance` besides, which takes its outputs for every token.
    `removes_units` says that it cuts whole heads and neurons out of an encoder instead of solving one linear at a time.
    """

    name: ClassVar[str]
    statistic: ClassVar[StatisticKind | None]
    sensitivity: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    whole_model: ClassVar[bool] = False
    removes_units: ClassVar[bool] = False

    def arrange(self, model: nn.Module, blocks: Sequence[Sequence[Linear]], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        """The pattern of each linear by name, for a method that decides over many of them at once; by default what was asked for.

        Args:
            model: the model before anything is pruned.
            blocks: the linears to prune, block by block, then those outside the blocks.
            patterns: what was asked for, by linear name.
        """
        return dict(patterns)

    def solve(self, weight: torch.Tensor, statistics: Statistics | None, pattern: Pattern) -> Solution:
        """Prune `weight` `[out_features, in_features]` to `pattern`; device-free mathematics, nothing is changed in place."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """The name and every field, as JSON can hold them."""
        return {"name": self.name, **asdict(self)}


class Rows(Protocol):
    """`[tokens, width]` in the model's dtype, kept outside the device's memory (see `sparsekern.pruning.blockwise.feed_forward`)."""

    def read(self, rows: slice) -> torch.Tensor:
        """Some rows in float32 on the model's device."""

    def write(self, rows: slice, values: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class Layer:
    """One linear of a feed-forward network: its dense weight `[out_features, in_features]`, its bias, and what it is pruned to."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    pattern: Pattern


@dataclass(frozen=True)
class FeedForwardProblem:
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` where there is a gate, with all its calibration inputs `x`.

    `inputs` and `hidden` are the statistics of what goes into up (and gate) and into down while all three are dense;
    `new_rows(width)` makes room for that many numbers a token; `tiles` are slices of the tokens, each small enough for the device.
    """

    up: Layer
    gate: Layer | None
    down: Layer
    activation: str
    inputs: Statistics
    hidden: Statistics
    x: Rows
    new_rows: Callable[[int], Rows]
    tiles: Sequence[slice]


class FeedForwardSolution(NamedTuple):
    """Pruned weights (`gate` None where there is none), and the relative squared error of the network's output over all tokens,
    bias aside: `alone` with each linear solved on its own, `error` with these weights.
    """

    up: torch.Tensor
    gate: torch.Tensor | None
    down: torch.Tensor
    error: float
    alone: float


class FeedForwardMethod(Method):
    """Base of the methods that solve the feed-forward network of each block together; `solve` is for all other linears.

    `attention` says what the inputs of the network are taken behind: the block's other linears while they are `"dense"`, or once
    they are `"pruned"`.
    """

    attention: str

    def solve_feed_forward(self, problem: FeedForwardProblem) -> FeedForwardSolution:
        """Prune the linears of one feed-forward network; nothing of `problem` but rows and statistics of its own making is changed."""
        raise NotImplementedError
