"""What a pruning method is: a frozen config of one of four classes, which decides the loop that runs it.

`LinearMethod` solves one linear at a time, `BlockMethod` the feed-forward network of each block together, `GradualMethod` prunes the
whole model in steps and trains it, `RemovalMethod` removes attention heads and FFN neurons of an encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch

from ..models import Linear
from ..models.decoder_units import Units
from ..pattern import Pattern
from ._fields import Settings
from .statistics import FeatureNorm, Gram, Importance, Statistic


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
        """What `factor` added to the diagonal: `factor factor^T = G + shift I`."""

    def solve(self, cross: torch.Tensor, damping: float) -> torch.Tensor:
        """Return the `W` of `W (G + shift I) = cross`; it is zero at features that were never active."""

    def empty(self) -> HasGram:
        """Return statistics of the same width that have seen no token."""

    def add(self, x: torch.Tensor, row_mask: torch.Tensor | None) -> None:
        """Take in the rows of `x` `[tokens, in_features]` where `row_mask` is True, or all where it is None."""

    def row_energy(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `w G w^T` of each row, `[out_features]` float64: its squared output over the calibration tokens."""


class HasImportance(HasNorms, Protocol):
    """Statistics that know how much the output reacts to each weight."""

    @property
    def importance(self) -> torch.Tensor:
        """`[out_features, in_features]` float32, over all datasets so far."""


class Solution(NamedTuple):
    """A pruned weight matrix.

    Attributes:
        weight: `[out_features, in_features]` in the dtype it came in.
        row_error: `[out_features]` float64, the squared output error of each row over the calibration tokens: `d G d^T` with the
            undamped Gram matrix `G`, rounding to a half dtype included. None where the method does not know it.
    """

    weight: torch.Tensor
    row_error: torch.Tensor | None = None


class Method(Settings, ABC):
    """Base of the method configs, which are frozen dataclasses. Derive from one of the four classes below.

    Attributes:
        name: what reports, checkpoints and the command line call the method.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def needs_data(self) -> bool:
        """Whether the method needs calibration data."""

    def settings(self) -> dict[str, object]:
        """Return the name and every field, as JSON can hold them."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class PlannedBlock:
    """The linears of one block that are to be pruned, and how to find the block's units.

    Attributes:
        linears: the linears, in the model's order.
        units: finds the attention heads and FFN neurons among all linears of the block; None for the linears outside the blocks.
    """

    linears: Sequence[Linear]
    units: Callable[[], list[Units]] | None = None


class LinearMethod(Method):
    """Base of the methods that solve one linear at a time, block by block.

    Attributes:
        needs: the class of the statistic that `solve` is given: `FeatureNorm`, `Gram`, `SampleImportance` or `GramImportance` of
            `sparsekern.methods`; None for a method without calibration data.
    """

    needs: type[Statistic] | None = None

    @property
    def needs_data(self) -> bool:
        return self.needs is not None

    def allocate(self, blocks: Sequence[PlannedBlock], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        """Return the pattern of each linear by name; override it in a method that decides over many linears at once.

        Args:
            blocks: what is to be pruned, block by block, then outside the blocks; all of it is still dense.
            patterns: the patterns that were asked for, by linear name.
        """
        return dict(patterns)

    @abstractmethod
    def solve(self, weight: torch.Tensor, statistics: Statistic | None, pattern: Pattern) -> Solution:
        """Return `weight` pruned to `pattern`; nothing is changed in place.

        Args:
            weight: `[out_features, in_features]`, float32, bfloat16 or float16.
            statistics: an instance of `needs`, or None.
            pattern: what to prune to.
        """


class Rows(Protocol):
    """`[tokens, width]` in the model's dtype, kept outside the device's memory (see `sparsekern.pruning.blockwise.feed_forward`)."""

    def read(self, rows: slice) -> torch.Tensor:
        """Some rows in float32 on the model's device."""

    def write(self, rows: slice, values: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class Layer:
    """One linear of a feed-forward network: its dense weight `[out_features, in_features]`, its bias and its pattern."""

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
    inputs: HasGram
    hidden: HasGram
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


class BlockMethod(LinearMethod):
    """Base of the methods that solve the feed-forward network of each block together; `solve` is for all other linears.

    Attributes:
        attention: whether the inputs of the network are taken behind the block's other linears while they are `"dense"`, or once
            they are `"pruned"`.
    """

    attention: str

    @abstractmethod
    def solve_feed_forward(self, problem: FeedForwardProblem) -> FeedForwardSolution:
        """Return the pruned linears of one network; only rows and statistics that it made itself may be changed."""


class GradualMethod(Method):
    """Base of the methods that prune the whole model in steps and train it after each."""

    @property
    @abstractmethod
    def trains(self) -> bool:
        """Whether any optimizer step is taken."""

    @property
    def needs_data(self) -> bool:
        return self.trains

    @abstractmethod
    def allocate(self, blocks: Sequence[PlannedBlock], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        """Return the final pattern of each linear by name. See `LinearMethod.allocate`."""


class RemovalMethod(Method):
    """Base of the methods that remove attention heads and FFN neurons of an encoder, which changes its shapes.

    Attributes:
        remove: the share to remove, of what the method counts.
    """

    remove: float

    @property
    def needs_data(self) -> bool:
        return True


def check_method(method: Method) -> None:
    """Raise unless `method`, perhaps of a class of the user's own, is complete.

    Raises:
        TypeError: a class that derives from none of the four, is no dataclass, has no name, or needs an unknown statistic.
    """
    kind = type(method)
    if not isinstance(method, (LinearMethod, GradualMethod, RemovalMethod)):
        raise TypeError(
            f"method: expected a LinearMethod, BlockMethod, GradualMethod or RemovalMethod, got {kind.__name__}, which is none of them"
        )
    if not is_dataclass(method):
        raise TypeError(f"method: expected a dataclass, whose fields are its settings; got {kind.__name__} without @dataclass")
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f"method: expected {kind.__name__}.name to be a word that reports call it by, got {name!r}")
    if isinstance(method, LinearMethod):
        needs = method.needs
        if needs is not None and not (isinstance(needs, type) and issubclass(needs, (FeatureNorm, Gram, Importance))):
            raise TypeError(
                f"method: expected {kind.__name__}.needs to be FeatureNorm, Gram, SampleImportance, GramImportance or None, "
                f"got {needs!r}"
            )
