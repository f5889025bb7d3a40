"""Formats of the packed weights of experts: those of `formats`, with a first axis of experts, for the weights of a whole layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._checks import HALF_OR_FLOAT, check_tensor
from .._counts import nonzeros_of_rows
from ..layouts import packed_rows as rows_layout
from ..layouts.packed_experts import bitmask_rows_of, check_bitmask_experts, check_ends, join_bitmask_experts
from ..ops import OPS
from ..ops.bitmask_pack import bitmask_pack
from ..ops.nm_pack import nm_pack
from .formats import BITMASK_UNPACK, NM_UNPACK, Bitmask, NMPacked, format_of
from .packed_format import Format, Shape, Spec, Tensors

BITMASK_EXPERTS, NM_EXPERTS = OPS["bitmask_experts_linear"].call, OPS["nm_experts_linear"].call


class ExpertsFormat(Format):
    """A packed format of the weights of experts; `shape` is `(experts, out_features, in_features)`."""

    def check_shape(self, shape: Shape) -> Shape:
        """Return `shape` as a tuple; raise `ValueError` unless it is three whole numbers of at least 0."""
        whole = isinstance(shape, (tuple, list)) and all(type(size) is int and size >= 0 for size in shape)
        if not whole or len(shape) != 3:
            raise ValueError(f"shape: expected (experts, out_features, in_features), got {shape!r}")
        return tuple(shape)

    @abstractmethod
    def multiply(self, x: torch.Tensor, experts: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply each row of `x` by its experts: `[tokens, choices, out_features]`, from tensors that passed `check`."""


@dataclass(frozen=True)
class BitmaskExperts(ExpertsFormat, Bitmask):
    """The format of the non-zeros of all experts and one bit for each weight."""

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        check_tensor("weight", weight, ndim=3, dtypes=HALF_OR_FLOAT)
        packed = [bitmask_pack(own.detach()) for own in weight]
        return join_bitmask_experts(packed, (weight.shape[1], weight.shape[2]), weight.dtype)

    def unpack(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        check_ends(tensors["values"], tensors["starts"])
        dense = tensors["values"].new_empty(shape)
        for expert, weight in enumerate(dense):
            own = bitmask_rows_of(tensors["values"], tensors["bitmask"], tensors["starts"], tensors["order"], expert)
            weight.copy_(BITMASK_UNPACK(own["values"], own["bitmask"], own["starts"], own["order"], shape[2]))
        return dense

    def multiply(self, x: torch.Tensor, experts: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None) -> torch.Tensor:
        return BITMASK_EXPERTS(x, experts, tensors["values"], tensors["bitmask"], tensors["starts"], tensors["order"], bias)

    def packed_bytes(self, weight: torch.Tensor) -> int:
        check_tensor("weight", weight, ndim=3, dtypes=HALF_OR_FLOAT)
        slots = rows_layout.SLACK
        for own in weight:
            slots += int(rows_layout.slot_counts(nonzeros_of_rows(own).sort().values, weight.dtype).sum())
        specs = self.specs(tuple(weight.shape), weight.dtype, slots * rows_layout.lanes(weight.dtype))
        return sum(spec.nbytes for spec in specs.values())

    def specs(self, shape: Shape, dtype: torch.dtype, stored: int | None = None) -> dict[str, Spec]:
        count, rows, columns = self.check_shape(shape)
        specs = Bitmask.specs(self, (rows, columns), dtype, stored)
        return {name: spec if name == "values" else Spec((count, *spec.shape), spec.dtype) for name, spec in specs.items()}

    def _check_contents(self, tensors: Tensors, shape: Shape) -> None:
        check_bitmask_experts(tensors["values"], tensors["bitmask"], tensors["starts"], tensors["order"], shape[2])


@dataclass(frozen=True)
class NMExperts(ExpertsFormat, NMPacked):
    """The format of N values of every M inputs and their positions, for all experts."""

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        self._check_weight(weight)
        if not len(weight):
            return self.empty(tuple(weight.shape), weight.dtype, device=weight.device)
        packed = [nm_pack(own.detach(), self.n, self.m) for own in weight]
        return {name: torch.stack([own[name] for own in packed]) for name in self.tensor_names}

    def unpack(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        values, codes = tensors["values"].flatten(0, 1), tensors["codes"].flatten(0, 1)
        return NM_UNPACK(values, codes, self.n, self.m, shape[2]).view(shape)

    def multiply(self, x: torch.Tensor, experts: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None) -> torch.Tensor:
        return NM_EXPERTS(x, experts, tensors["values"], tensors["codes"], self.n, self.m, bias)

    def packed_bytes(self, weight: torch.Tensor) -> int:
        self._check_weight(weight)
        for own in weight:
            rows_layout.check_fits(own, self.n, self.m)
        return sum(spec.nbytes for spec in self.specs(tuple(weight.shape), weight.dtype).values())

    def specs(self, shape: Shape, dtype: torch.dtype, stored: int | None = None) -> dict[str, Spec]:
        count, rows, columns = self.check_shape(shape)
        specs = NMPacked.specs(self, (rows, columns), dtype)
        return {name: Spec((count, *spec.shape), spec.dtype) for name, spec in specs.items()}

    def _check_weight(self, weight: torch.Tensor) -> None:
        check_tensor("weight", weight, ndim=3, dtypes=HALF_OR_FLOAT)
        self._check_columns(weight.shape[2])

    def _check_contents(self, tensors: Tensors, shape: Shape) -> None:
        values, codes = tensors["values"].flatten(0, 1), tensors["codes"].flatten(0, 1)
        rows_layout.check_nm_rows(values, codes, self.n, self.m, shape[2])


def experts_format_of(name: str) -> ExpertsFormat:
    """Return the format of experts with this name: `"bitmask"`, or `"N:M"` with M of at most 16.

    Raises:
        ValueError: no format has this name.
    """
    found = format_of(name)
    if not found.typed:
        raise ValueError(f"format: expected 'bitmask' or 'N:M' for experts, got {name!r}")
    return NMExperts(found.n, found.m) if isinstance(found, NMPacked) else BitmaskExperts()


def layout_of(name: str, shape: Shape) -> Format:
    """Return the format of this name for weights of a shape: of one matrix, or of experts, whose shape has three sizes.

    Raises:
        ValueError: no format has this name.
    """
    make: Callable[[str], Format] = experts_format_of if isinstance(shape, (tuple, list)) and len(shape) == 3 else format_of
    return make(name)
