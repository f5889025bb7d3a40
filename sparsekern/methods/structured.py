"""Structured magnitude pruning of decoders: set the heads and neurons of the smallest norm to zero. Needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch

from ..models.decoder_units import Units
from ..pattern import Pattern, Unstructured, pruned_count
from ._fields import choice
from .base import LinearMethod, PlannedBlock
from .solution import Solution


@dataclass(frozen=True)
class Slices:
    """The pattern of one linear with whole rows and columns pruned.

    Attributes:
        rows: indices of the pruned rows.
        columns: indices of the pruned columns.
    """

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"-{len(self.rows)},-{len(self.columns)}"


@dataclass(frozen=True)
class Structured(LinearMethod):
    """Set a share of each block's attention heads and FFN neurons to zero: those of the smallest L2 norm.

    A unit consists of its columns of the output (down) projection and its rows of the query, key and value (gate and up)
    projections. Keys and values that query heads share are pruned with the last of these heads. Of `n` units `floor(sparsity *
    n)` are pruned, of equal ones those of the higher index. The sparsity is that of the output projection. Linears without units
    stay dense. So do linears that are left out, which still count for a unit's norm. An output projection cannot be left out
    alone. The zeros stay in the model, whose shapes do not change.

    Example:
        >>> report = sparsekern.prune(model, sparsekern.Structured(units="neurons"), 0.5, progress=False)
        >>> int((model.model.layers[0].mlp.down_proj.weight == 0).all(0).sum())
        24

    Source: the norm of a filter of Li et al., Pruning filters for efficient convnets, 2017, section 3.1 (with L2), on the units of
    Michel et al., Are sixteen heads really better than one?, 2019.
    """

    name: ClassVar[str] = "structured"

    units: str = choice("both", ("both", "heads", "neurons"), help="kind of units to prune; the others stay dense")

    def allocate(self, blocks: Sequence[PlannedBlock], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        arranged = dict.fromkeys(patterns, Slices())
        for block in blocks:
            if block.units is None or not block.linears:
                continue
            found = [units for units in block.units() if self.units in ("both", units.kind) and _is_planned(units, patterns)]
            if not found:
                raise ValueError(f"Structured.units: found no {self._wanted} in the block of {block.linears[0].name}")
            for units in found:
                pattern = patterns[units.consumer.name]
                if not isinstance(pattern, Unstructured):
                    raise ValueError(f"pattern: expected a sparsity for Structured, which prunes whole units, got '{pattern}'")
                _mark(arranged, units, pruned_count(units.count, pattern.sparsity))
        return cast("dict[str, Pattern]", arranged)  # which only `solve` reads

    def solve(self, weight: torch.Tensor, statistics: object, pattern: Pattern | Slices) -> Solution:
        if not isinstance(pattern, Slices):
            raise ValueError("Structured: expected the rows and columns that allocate has chosen; call sparsekern.prune")
        mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        mask[list(pattern.rows)] = False
        mask[:, list(pattern.columns)] = False
        return Solution(weight.masked_fill(~mask, 0))

    @property
    def _wanted(self) -> str:
        return "heads or neurons" if self.units == "both" else self.units


def _is_planned(units: Units, patterns: Mapping[str, Pattern]) -> bool:
    """Return True if the units are pruned. Raise if their producers are pruned without their consumer."""
    consumer = units.consumer.name
    if consumer in patterns:
        return True
    owner = consumer.rpartition(".")[0]
    beside = [name for name in patterns if name.rpartition(".")[0] == owner]
    if beside:
        raise ValueError(
            f"include, exclude, patterns: expected {consumer}, without which Structured cannot prune {units.kind}, "
            f"got only {', '.join(beside)} of its module"
        )
    return False


def _mark(arranged: dict[str, Slices], units: Units, pruned: int) -> None:
    """Add the slices of the `pruned` units of the smallest norm to the patterns of their linears."""
    order = units.square_norms().sort(descending=True, stable=True).indices.tolist()
    gone = set(order[units.count - pruned :])
    features = _features(gone, units.size)
    arranged[units.consumer.name] = replace(arranged[units.consumer.name], columns=features)
    rows = dict.fromkeys((linear.name for linear in units.producers), features)
    for linear in units.shared:
        users = units.count // units.groups(linear)
        unused = {group for group in range(units.groups(linear)) if gone.issuperset(range(group * users, (group + 1) * users))}
        rows[linear.name] = _features(unused, units.size)
    for name in rows.keys() & arranged.keys():
        arranged[name] = replace(arranged[name], rows=rows[name])


def _features(units: set[int], size: int) -> tuple[int, ...]:
    return tuple(unit * size + offset for unit in sorted(units) for offset in range(size))
