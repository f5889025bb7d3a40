"""Base classes of the pruning methods. A method is a frozen config of one of five classes, which decides the loop that runs it.

`LinearMethod` solves one linear at a time, `BlockMethod` the feed-forward network of each block together, `GradualMethod` prunes the
whole model in steps and trains it, `RemovalMethod` removes attention heads and FFN neurons of an encoder, `ExpertMethod` removes
experts of a mixture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from ..models import Linear
from ..models.decoder_units import Units
from ..pattern import Pattern
from ._fields import Settings
from .network import FeedForwardProblem, FeedForwardSolution
from .solution import Solution, Team, Work
from .statistics import ExpertSums, FeatureNorm, Gram, Importance, Statistic, inputs_of

if TYPE_CHECKING:
    from typing_extensions import Self


class Method(Settings, ABC):
    """Base of the method configs, which are frozen dataclasses.

    A method of your own derives from `LinearMethod`, `BlockMethod`, `GradualMethod`, `RemovalMethod` or `ExpertMethod` of
    `sparsekern.methods`.

    Attributes:
        name: the method's name in reports, checkpoints and on the command line.

    Example:
        >>> method = sparsekern.Wanda()
        >>> isinstance(method, sparsekern.Method), method.needs_data
        (True, True)
        >>> sparsekern.Magnitude(scope="row").settings()
        {'name': 'magnitude', 'scope': 'row'}
    """

    name: ClassVar[str]

    def __new__(cls, *settings: object, **named: object) -> Self:
        """Make an instance; raise `TypeError` for a class that derives from `Method` alone, for which there is no loop."""
        if "needs_data" in cls.__abstractmethods__:
            raise _of_no_loop(cls)
        return super().__new__(cls)

    @property
    @abstractmethod
    def needs_data(self) -> bool:
        """True if the method needs calibration data."""

    def settings(self) -> dict[str, object]:
        """Return the name and every field as values that JSON can hold."""
        return {"name": self.name, **asdict(cast(Any, self))}  # every method is a dataclass, see `check_method`


@dataclass(frozen=True)
class PlannedBlock:
    """The linears to prune in one block, and a function that finds the block's units.

    Attributes:
        linears: the linears, in the model's order.
        units: finds the attention heads and FFN neurons among all linears of the block; None for the linears outside the blocks.
    """

    linears: Sequence[Linear]
    units: Callable[[], list[Units]] | None = None


class LinearMethod(Method):
    """Base of the methods that solve one linear at a time, block by block."""

    @property
    def needs(self) -> type[Statistic] | None:
        """The class of the statistic that `solve` is given; None for a method without calibration data.

        It is `FeatureNorm`, `Gram`, `SampleImportance` or `GramImportance` of `sparsekern.methods`. A method may override the property
        by a class attribute.
        """
        return None

    @property
    def needs_data(self) -> bool:
        return self.needs is not None

    @property
    def needs_whole_model(self) -> bool:
        """True if `allocate` reads weights, so that the whole model has to be in memory. An override is taken to read them."""
        return type(self).allocate is not LinearMethod.allocate

    def allocate(self, blocks: Sequence[PlannedBlock], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        """Return the pattern of each linear by name. A method that decides over several linears at once overrides it.

        Args:
            blocks: the linears to prune, block by block, then those outside the blocks. All of them are still dense.
            patterns: the requested patterns, by linear name.
        """
        return dict(patterns)

    def solves_rows_alone(self, pattern: Pattern) -> bool:
        """Return whether each row of a solution follows from the statistics and that row of the weight alone.

        Then parts of the rows may be solved in calls of their own, by several processes. False is safe.

        Args:
            pattern: the pattern to prune to.
        """
        return False

    def solves_tiles(self, pattern: Pattern) -> bool:
        """Return whether the method has a `solve_tiles` for a pattern. False is safe.

        Args:
            pattern: the pattern to prune to.
        """
        return False

    def solve_tiles(self, weight: torch.Tensor, tiles: Sequence[slice], statistics: Any, pattern: Pattern, team: Team) -> Solution:
        """Return some rows of a solution, where the rows of the whole weight share no more than counts.

        The tiles decide the bits of a solution; how they are dealt to the processes of a team does not.

        Args:
            weight: the whole weight.
            tiles: its rows that are to be solved, one tile behind the other; there may be none.
            statistics: as for `solve`.
            pattern: the pattern to prune to.
            team: adds up counts over the processes that solve the other tiles meanwhile.
        """
        raise NotImplementedError(f"{type(self).__name__}.solve_tiles")

    def work(self, rows: int, features: int) -> Work:
        """Return about how much work a linear of `[rows, features]` is. Several processes divide the linears of a block by it."""
        if self.needs is None or inputs_of(self.needs) is not Gram:
            return Work(0.0, float(rows * features))
        return Work(features**3 / 6, rows * features**2 / 2)

    def solving_bytes(self, rows: int, features: int) -> int:
        """Return the most bytes of a CPU's memory that `solve` takes beside the weight, its statistics and one factor of them."""
        grams = self.needs is not None and inputs_of(self.needs) is Gram
        return 28 * rows * features + (8 * features**2 if grams else 0)  # measured: SparseGPT around zeros; a norm in float64

    @abstractmethod
    def solve(self, weight: torch.Tensor, statistics: Any, pattern: Pattern) -> Solution:
        """Return `weight` pruned to `pattern`, without changing anything in place.

        Args:
            weight: `[out_features, in_features]`, float32, bfloat16 or float16.
            statistics: an instance of `needs`, or None. An override names the type that it needs.
            pattern: the pattern to prune to.
        """

    def solve_many(
        self,
        weights: Sequence[torch.Tensor],
        statistics: Sequence[Any],
        pattern: Pattern,
        about: Callable[[int], AbstractContextManager[object]] = nullcontext,
    ) -> list[Solution]:
        """Return what `solve` returns for each of several weights of one shape and dtype, such as the experts of a block.

        A method that is faster on several weights at once overrides it. Its solutions equal those of `solve`.

        Args:
            weights: `[out_features, in_features]` each.
            statistics: for each weight, an instance of `needs`, or None. Weights with the same inputs share one instance.
            pattern: the pattern to prune to.
            about: makes the context in which weight `i` is solved. The caller seeds random numbers there, and names warnings and errors.
        """
        solutions = []
        for index, (weight, statistic) in enumerate(zip(weights, statistics, strict=True)):
            with about(index):
                solutions.append(self.solve(weight, statistic, pattern))
        return solutions


class BlockMethod(LinearMethod):
    """Base of the methods that solve the linears of each block's feed-forward network together; `solve` prunes all other linears.

    Attributes:
        attention: `"dense"` takes the inputs of the network while the block's other linears are dense, `"pruned"` once they are
            pruned.
    """

    attention: str

    @abstractmethod
    def solve_feed_forward(self, problem: FeedForwardProblem) -> FeedForwardSolution:
        """Return the pruned weights of one network. An override changes no rows or statistics but those that it made itself."""


class GradualMethod(Method):
    """Base of the methods that prune the whole model in steps and train it after each.

    Attributes:
        LOOP_READS: what the loop reads of a method beside `trains` and `allocate`; fields and methods of `Gradual`.
        mixed_precision: whether a float32 model is trained with bfloat16 products.
    """

    LOOP_READS: ClassVar[tuple[str, ...]] = (
        "steps", "chooser", "pattern_after", "epochs", "train_steps", "batch_tokens", "learning_rate", "warmup", "weight_decay", "clip",
        "mixed_precision",
    )  # fmt: skip

    mixed_precision: bool = False

    @property
    @abstractmethod
    def trains(self) -> bool:
        """True if any optimizer step is taken."""

    @property
    def needs_data(self) -> bool:
        return self.trains

    @abstractmethod
    def allocate(self, blocks: Sequence[PlannedBlock], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        """Return the final pattern of each linear by name. See `LinearMethod.allocate`."""


class RemovalMethod(Method):
    """Base of the methods that remove attention heads and FFN neurons of an encoder, which changes its shapes.

    Attributes:
        LOOP_READS: what the loop reads of a method; fields of `KPrune`.
        remove: the share of the method's budget to remove.
    """

    LOOP_READS: ClassVar[tuple[str, ...]] = (
        "remove", "budget", "objective", "temperature", "tuning", "scores", "curvature", "tune_bias", "ridge",
    )  # fmt: skip

    remove: float

    @property
    def needs_data(self) -> bool:
        return True


class ExpertMethod(Method):
    """Base of the methods that remove whole experts of a mixture, the same number in every layer.

    Attributes:
        remove: the share of each layer's experts to remove.
    """

    remove: float

    @property
    def needs_data(self) -> bool:
        return True

    @abstractmethod
    def scores(self, sums: ExpertSums) -> torch.Tensor:
        """Return the score of each expert of a layer, `[experts]` float64; the lowest are removed."""

    def left(self, experts: int, groups: int = 1) -> int:
        """Return how many of a layer's experts stay, a multiple of `groups`.

        Raises:
            ValueError: `remove` is so small that no expert goes, or so large that none stays.
        """
        in_group = experts // groups
        gone = int(self.remove * in_group + 0.5)
        among = f"{in_group} experts" + (f" in each of {groups} groups" if groups > 1 else "")
        if not 0 < gone < in_group:
            what = "none" if not gone else "all"
            raise ValueError(
                f"{type(self).__name__}.remove: expected a share that removes some of {among}, got {self.remove}, which removes {what}"
            )
        return (in_group - gone) * groups

    def kept(self, scores: torch.Tensor, left: int, groups: int = 1) -> torch.Tensor:
        """Return the numbers of the experts that stay, ascending, `[left]` int64. Of equal scores the first stays.

        Args:
            scores: `[experts]`.
            left: number of experts that stay, a multiple of `groups`.
            groups: number of groups of consecutive experts, which keep equally many.
        """
        by_group = scores.view(groups, -1)
        order = by_group.argsort(dim=1, descending=True, stable=True)[:, : left // groups].sort(dim=1).values
        offsets = torch.arange(groups, device=scores.device)[:, None] * by_group.shape[1]
        return (order + offsets).flatten()


def _of_no_loop(kind: type) -> TypeError:
    known = "LinearMethod, BlockMethod, GradualMethod, RemovalMethod or ExpertMethod"
    return TypeError(f"method: expected a {known}, got {kind.__name__}, which is none of them")


def check_method(method: Method) -> None:
    """Raise unless the class of `method`, which may be the user's own, is complete.

    Raises:
        TypeError: the class derives from none of the five, is not a dataclass, has no name, needs an unknown statistic, or lacks what the
            loop of its base class reads.
    """
    kind = type(method)
    if not isinstance(method, (LinearMethod, GradualMethod, RemovalMethod, ExpertMethod)):
        raise _of_no_loop(kind)
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
        if isinstance(method, BlockMethod) and (needs is None or not issubclass(needs, Gram)):
            raise TypeError(f"method: expected {kind.__name__}.needs to be Gram, which solve_feed_forward is given, got {needs!r}")
    elif isinstance(method, (GradualMethod, RemovalMethod)):
        if missing := [read for read in method.LOOP_READS if not hasattr(method, read)]:
            raise TypeError(
                f"method: expected {kind.__name__} to have {', '.join(missing)}, which the loop of its base class reads"
            )
