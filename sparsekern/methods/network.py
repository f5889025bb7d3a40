"""The feed-forward network of a block, which a `BlockMethod` solves as a whole, and sums over its calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import torch

from ..pattern import Pattern
from .statistics import Gram

if TYPE_CHECKING:
    from typing_extensions import Self


class Rows(Protocol):
    """`[tokens, width]` in the model's dtype, kept outside the device's memory (see `sparsekern.pruning.blockwise.feed_forward`)."""

    def read(self, rows: slice) -> torch.Tensor:
        """Return `rows` in float32 on the model's device."""

    def write(self, rows: slice, values: torch.Tensor) -> None:
        """Replace `rows` by `values`, rounded to the model's dtype."""


@dataclass(frozen=True)
class Layer:
    """One linear of a feed-forward network.

    Attributes:
        weight: `[out_features, in_features]`, dense.
        bias: `[out_features]`; None where there is none.
        pattern: the pattern to prune to.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    pattern: Pattern


class TokenSums(Protocol):
    """Sums over some of the calibration tokens."""

    def plus(self, later: Self) -> Self:
        """Return the sums over the tokens of both. Neither is used afterwards."""

    def tensors(self) -> list[tuple[torch.Tensor, bool]]:
        """Return the tensors that hold the sums, each with whether only the lower triangle of it is valid."""


Sums = TypeVar("Sums", bound=TokenSums)


class OverTokens(Protocol):
    """What takes sums over all calibration tokens."""

    def __call__(self, sums_of: Callable[[Iterable[slice]], Sums]) -> Sums:
        """Return the sums over all tokens.

        Args:
            sums_of: returns the sums over the tokens of some tiles, which follow one another; there may be none.
        """


@dataclass(frozen=True)
class FeedForwardProblem:
    """A network `down(act(up(x)))`, or `down(act(gate(x)) * up(x))` where there is a gate, with all its calibration inputs `x`.

    Attributes:
        up: the up projection.
        gate: the gate projection; None where there is none.
        down: the down projection.
        activation: the name of `act`, as `sparsekern.ops` takes it.
        inputs: statistics of the inputs of up and gate.
        hidden: statistics of the inputs of down, while all three linears are dense.
        x: the inputs of the calibration tokens.
        new_rows: makes room for `width` numbers a token.
        over_tokens: takes sums over the tokens, tile by tile. Each tile is small enough for the device. Several processes share the
            tokens, so that `x` and `new_rows` hold those of this process alone.
    """

    up: Layer
    gate: Layer | None
    down: Layer
    activation: str
    inputs: Gram
    hidden: Gram
    x: Rows
    new_rows: Callable[[int], Rows]
    over_tokens: OverTokens


class FeedForwardSolution(NamedTuple):
    """The pruned weights of a feed-forward network, and the relative squared error of its output over all tokens, without the bias.

    Attributes:
        up: weight of the up projection.
        gate: weight of the gate projection; None where there is none.
        down: weight of the down projection.
        error: the error with these weights.
        alone: the error with each linear solved on its own.
    """

    up: torch.Tensor
    gate: torch.Tensor | None
    down: torch.Tensor
    error: float
    alone: float
