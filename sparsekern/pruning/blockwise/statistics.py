"""Statistics of inputs, shared by the linears that have the same inputs.

Linears that are called with the very same tensor (query, key and value; gate and up) share one Gram matrix and one factor. They are
observed while the model runs, since no table of names could cover every model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from ...methods.statistics import FeatureNorm, Gram, Importance, InputStatistic, Statistic, inputs_of
from ...models import Linear
from ...ranks import World
from ...ranks.sums import add_all_over_ranks
from ..batches import TOKENS

BETWEEN_NAMES = "|"


class Rows(Protocol):
    """What statistics ask of a batch: which rows of an activation are real tokens, and of which sample."""

    def flatten(self, x: torch.Tensor, mask: str | None = TOKENS) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return an activation as `(rows [n, features], row_mask [n] or None)`; the mask is False at padding."""

    def used(self, rows: int, mask: str | None = TOKENS) -> int:
        """Return how many of the `rows` of a flattened activation belong to real tokens."""

    def sample_of_row(self, row: int, rows: int, mask: str | None = TOKENS) -> int | None:
        """Return the number of the sample of row `row` of `rows`, or None where it is not known."""


class SharedStatistics:
    """One statistic of the inputs for each set of linears that have had the same inputs in every batch so far.

    Linears with equally many features start in one set. A batch that feeds them different tensors splits the set, and each part
    continues from a copy of the common statistic. If the method needs an `Importance`, each linear also has its own.

    Attributes:
        groups: the linears of each set, and their statistic.
    """

    def __init__(
        self,
        linears: Iterable[Linear],
        needs: type[Statistic] | None,
        measure_error: bool = False,
        masks: Mapping[str, Sequence[str | None]] | None = None,
    ) -> None:
        """Make empty statistics.

        Args:
            linears: the linears to gather statistics of.
            needs: the statistic that the method needs; None only where errors are measured.
            measure_error: take a Gram matrix of the inputs in any case, to measure errors.
            masks: for each linear, the padding masks that the inputs of its calls follow, see `Batch.flatten`; the last is that of
                all further calls. None is `TOKENS` for all.
        """
        self._masks = masks or {}
        linears = list(linears)
        self._places = {linear.name: place for place, linear in enumerate(linears)}
        by_features: dict[int, list[Linear]] = {}
        for linear in linears:
            by_features.setdefault(linear.features, []).append(linear)
        make = Gram if measure_error or needs is None else inputs_of(needs)
        self.groups: list[tuple[list[Linear], InputStatistic]] = [
            (members, make(width, members[0].weight.device)) for width, members in by_features.items()
        ]
        self._own: dict[str, Importance] = {}
        if needs is not None and issubclass(needs, Importance):
            self._own = {linear.name: needs(linear.weight, statistic) for members, statistic in self.groups for linear in members}

    def add(self, batch: Rows, inputs: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Add one batch.

        Args:
            batch: the batch.
            inputs: for each linear's name, the tensors `[..., features]` that it was called with.

        Raises:
            ValueError: NaN or Inf in an input, naming the linear and the calibration sample.
        """
        self._split(lambda linear: tuple(map(identity, inputs[linear.name])))
        for members, statistic in self.groups:
            name = members[0].name
            masks = self._masks.get(name, (TOKENS,))
            for call, x in enumerate(inputs[name]):
                mask = masks[min(call, len(masks) - 1)]
                add_input(statistic, name, x, batch, mask)
                for linear in members if self._own else ():
                    _add_importance(self._own[linear.name], linear.name, *batch.flatten(x, mask))

    def merged(self, later: SharedStatistics) -> SharedStatistics:
        """Return the statistics of the batches of both, which are the same linears'. Neither is used afterwards."""
        mine, theirs = self._owners(), later._owners()
        self._split_by(theirs)
        later._split_by(mine)
        other = {members[0].name: statistic for members, statistic in later.groups}
        for members, statistic in self.groups:
            added = other[members[0].name]
            statistic.include(added.total)
            statistic.tokens += added.tokens
        for name, own in self._own.items():
            if own.SEES_TOKENS:
                own.include(later._own[name].total)
        return self

    def add_over_ranks(self, world: World) -> None:
        """Replace the statistics by those of the batches of all ranks. All ranks call this."""
        if world.size > 1:
            found = world.gather(
                "sets of linears", [[statistic.tokens, self._names(members)] for members, statistic in self.groups]
            )
            tokens = dict.fromkeys(self._places, 0)
            for sets in found:
                owner = {name: number for number, (_, names) in enumerate(sets) for name in names}
                self._split_by(owner)
                for own_tokens, names in sets:
                    tokens |= {name: tokens[name] + own_tokens for name in names}
            for members, statistic in self.groups:
                statistic.tokens = tokens[members[0].name]
        self.groups.sort(key=lambda group: self._places[group[0][0].name])
        sums = [(statistic.total, isinstance(statistic, Gram)) for _, statistic in self.groups]
        sums += [(own.total, False) for own in self._own.values() if own.SEES_TOKENS]
        add_all_over_ranks(world, sums)

    def unseen(self) -> list[Linear]:
        """Return the linears that no token reached, in this dataset or in those included."""
        found = [linear for members, statistic in self.groups if not statistic.tokens for linear in members]
        return [linear for linear in found if not self._total_of(linear).any()]

    def totals(self) -> dict[str, torch.Tensor]:
        """Return the sums that add up over datasets, by the names of their linears."""
        if self._own:
            return {name: statistic.total for name, statistic in self._own.items()}
        return {BETWEEN_NAMES.join(linear.name for linear in members): statistic.total for members, statistic in self.groups}

    def include(self, totals: Mapping[str, torch.Tensor]) -> None:
        """Add the `totals` of earlier datasets."""
        if self._own:
            for name, importance in self._own.items():
                importance.include(totals[name].to(importance.weight.device))
            return
        owner = {name: names for names in totals for name in names.split(BETWEEN_NAMES)}
        self._split(lambda linear: owner[linear.name])
        for members, statistic in self.groups:
            total = totals[owner[members[0].name]]
            statistic.include(total.to(members[0].weight.device))

    def of(self, linear: Linear, inputs: InputStatistic) -> Statistic:
        """Return the statistic of `linear` that the method needs; `inputs` is the statistic of its set."""
        return self._own.get(linear.name, inputs)

    def _split_by(self, owner: Mapping[str, Hashable]) -> None:
        self._split(lambda linear: owner[linear.name])

    def _owners(self) -> dict[str, int]:
        """Return the number of the set of each linear."""
        return {linear.name: number for number, (members, _) in enumerate(self.groups) for linear in members}

    @staticmethod
    def _names(members: Sequence[Linear]) -> list[str]:
        return [linear.name for linear in members]

    def _total_of(self, linear: Linear) -> torch.Tensor:
        own = self._own.get(linear.name)
        return own.total if own is not None else next(statistic.total for members, statistic in self.groups if linear in members)

    def _split(self, key: Callable[[Linear], Hashable]) -> None:
        """Split each set into sets of linears with the same `key`."""
        refined = []
        for members, statistic in self.groups:
            parts: dict[Hashable, list[Linear]] = {}
            for linear in members:
                parts.setdefault(key(linear), []).append(linear)
            statistics = [statistic] + [statistic.clone() for _ in range(len(parts) - 1)]
            for part, own in zip(parts.values(), statistics, strict=True):
                refined.append((part, own))
                for linear in part if self._own else ():
                    self._own[linear.name].inputs = own
        self.groups = refined


def add_input(statistic: FeatureNorm | Gram, name: str, x: torch.Tensor, batch: Rows, mask: str | None) -> None:
    """Add one input of the linear `name` to a statistic.

    Raises:
        ValueError: NaN or Inf in a row that is no padding, naming the linear and the calibration sample.
    """
    try:
        rows, row_mask = batch.flatten(x, mask)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    try:
        statistic.add(rows, row_mask, None if row_mask is None else batch.used(len(rows), mask))
    except ValueError as error:
        raise _named(error, name, rows, row_mask, batch, mask) from error


def _add_importance(importance: Importance, name: str, rows: torch.Tensor, row_mask: torch.Tensor | None) -> None:
    try:
        importance.add(rows, row_mask)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _named(
    error: ValueError, name: str, rows: torch.Tensor, row_mask: torch.Tensor | None, batch: Rows, mask: str | None
) -> ValueError:
    bad = ~torch.isfinite(rows).all(1)
    if row_mask is not None:
        bad &= row_mask
    if not bad.any():
        return ValueError(f"{name}: {error}")
    row = int(bad.nonzero()[0])
    value = float(rows[row][~torch.isfinite(rows[row])][0])
    sample = batch.sample_of_row(row, len(rows), mask)
    where = "an unknown calibration sample" if sample is None else f"calibration sample {sample}"
    return ValueError(
        f"{name}: its input is {value} in {where} (row {row} of the batch); no damping can help. "
        "Leave that sample out, or run the model in float32 or bfloat16 if float16 overflowed"
    )


def identity(x: torch.Tensor) -> tuple:
    """Return a key that two live tensors share only if they have the same values in the same memory."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype
