"""The formats of packed weights: bitmask, N:M, N:M with 4-bit values, and 8-bit values without zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._checks import HALF_OR_FLOAT, check_tensor
from .._counts import nonzeros_of_rows
from ..layouts import packed_rows as rows_layout
from ..layouts.int8_rows import check_int8, quantize_rows, restore_rows
from ..layouts.nm_q4 import COLUMNS, PATTERNS, Q4Layout, check_q4
from ..layouts.q4_grid import grid_scales, is_on_grid
from ..ops import OPS
from ..ops.bitmask_pack import bitmask_pack
from ..ops.nm_linear import check_pattern
from ..ops.nm_pack import nm_pack
from ..ops.nm_q4_linear import check_q4_pattern
from ..ops.nm_q4_pack import nm_q4_pack
from ..pattern import NM, parse_pattern
from .packed_format import Format, Shape, Spec, Tensors, check_shape

BITMASK_LINEAR, BITMASK_UNPACK = OPS["bitmask_linear"].call, OPS["bitmask_unpack"].overload
NM_LINEAR, NM_UNPACK = OPS["nm_linear"].call, OPS["nm_unpack"].overload
Q4_LINEAR, Q4_UNPACK = OPS["nm_q4_linear"].call, OPS["nm_q4_unpack"].overload
INT8_LINEAR = OPS["int8_linear"].call
Q4 = "-q4"  # ends the names of formats of 4-bit values
INT8 = "int8"


@dataclass(frozen=True)
class Bitmask(Format):
    """The format of the non-zeros and one bit for each weight, for any sparsity: bitmask rows of `layouts.packed_rows`."""

    name = "bitmask"
    tensor_names = ("values", "bitmask", "starts", "order")

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
        return bitmask_pack(weight.detach())

    def unpack(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return BITMASK_UNPACK(tensors["values"], tensors["bitmask"], tensors["starts"], tensors["order"], shape[1])

    def _multiply(self, x: torch.Tensor, tensors: Tensors, shape: Shape, bias: torch.Tensor | None) -> torch.Tensor:
        return BITMASK_LINEAR(x, tensors["values"], tensors["bitmask"], tensors["starts"], tensors["order"], bias)

    def packed_bytes(self, weight: torch.Tensor) -> int:
        check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
        counts = nonzeros_of_rows(weight).sort().values
        slots = int(rows_layout.slot_counts(counts, weight.dtype).sum()) + rows_layout.SLACK
        specs = self.specs((weight.shape[0], weight.shape[1]), weight.dtype, slots * rows_layout.lanes(weight.dtype))
        return sum(spec.nbytes for spec in specs.values())

    def stored(self, tensors: Tensors) -> int:
        return tensors["values"].numel()

    def specs(self, shape: Shape, dtype: torch.dtype, stored: int | None = None) -> dict[str, Spec]:
        if isinstance(stored, bool) or not isinstance(stored, int) or stored < 0:
            raise ValueError(f"stored: expected the number of values of a bitmask, got {stored!r}")
        rows, columns = check_shape(shape)
        return {
            "values": Spec((stored,), dtype),
            "bitmask": Spec((rows, rows_layout.words(columns)), torch.int64),
            "starts": Spec((rows_layout.tiles(rows) + 1,), torch.int64),
            "order": Spec((rows,), torch.int32),
        }

    def _check_contents(self, tensors: Tensors, shape: Shape) -> None:
        rows_layout.check_bitmask_rows(tensors["values"], tensors["bitmask"], tensors["starts"], tensors["order"], shape[1])


@dataclass(frozen=True)
class NMPacked(Format):
    """The format of N values of every M inputs and their positions: N:M rows of `layouts.packed_rows`.

    Attributes:
        n: stored values of a group.
        m: inputs of a group, at most 16.
    """

    n: int
    m: int
    tensor_names = ("values", "codes")

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m)

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        self._check_weight(weight)
        return nm_pack(weight.detach(), self.n, self.m)

    def unpack(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return NM_UNPACK(tensors["values"], tensors["codes"], self.n, self.m, shape[1])

    def _multiply(self, x: torch.Tensor, tensors: Tensors, shape: Shape, bias: torch.Tensor | None) -> torch.Tensor:
        return NM_LINEAR(x, tensors["values"], tensors["codes"], self.n, self.m, bias)

    def packed_bytes(self, weight: torch.Tensor) -> int:
        self._check_weight(weight)
        rows_layout.check_fits(weight, self.n, self.m)
        return sum(spec.nbytes for spec in self.specs((weight.shape[0], weight.shape[1]), weight.dtype).values())

    def specs(self, shape: Shape, dtype: torch.dtype, stored: int | None = None) -> dict[str, Spec]:
        rows, columns = check_shape(shape)
        self._check_columns(columns)
        per_row = rows_layout.stored_per_row(columns, self.n, self.m, dtype)
        return {
            "values": Spec((rows, per_row), dtype),
            "codes": Spec((rows, per_row * rows_layout.code_bits(self.m) // 32), torch.int32),
        }

    def _check_columns(self, columns: int) -> None:
        if columns % self.m:
            raise ValueError(f"weight: expected input features divisible by {self.m} for format {self.name!r}, got {columns}")

    def _check_weight(self, weight: torch.Tensor) -> None:
        check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
        self._check_columns(weight.shape[1])

    def _check_contents(self, tensors: Tensors, shape: Shape) -> None:
        rows_layout.check_nm_rows(tensors["values"], tensors["codes"], self.n, self.m, shape[1])


@dataclass(frozen=True)
class NMQ4Packed(Format):
    """The format of N values of 4 bits of every M inputs, with a scale for each row and 64 inputs: blocks of `layouts.nm_q4`.

    A product rounds its input to 8 bits. The weight has no dtype of its own: its layer has one.

    Attributes:
        n: stored values of a group.
        m: inputs of a group.
    """

    n: int
    m: int
    tensor_names = ("blocks",)
    typed = False

    def __post_init__(self) -> None:
        check_q4_pattern(self.n, self.m)

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}{Q4}"

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        self._check_weight(weight)
        scales = grid_scales(weight.detach())
        if scales is None:
            raise ValueError(
                f"weight: expected values of 4 bits for format {self.name!r}, multiples of a scale for each row and {COLUMNS} inputs, "
                "as prune(values='int4') makes them"
            )
        return {"blocks": nm_q4_pack(weight.detach(), scales, self.n, self.m)}

    def unpack(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        weight: torch.Tensor = Q4_UNPACK(tensors["blocks"], self.n, self.m, shape[0], shape[1])[0]
        return weight.to(dtype)

    def packed_bytes(self, weight: torch.Tensor) -> int:
        self._check_weight(weight)
        rows_layout.check_fits(weight, self.n, self.m)
        if not is_on_grid(weight.detach()):
            raise ValueError(f"weight: expected values of 4 bits for format {self.name!r}")
        return sum(spec.nbytes for spec in self.specs((weight.shape[0], weight.shape[1]), weight.dtype).values())

    def stored_values(self, tensors: Tensors, shape: Shape) -> int:
        return shape[0] * shape[1] // self.m * self.n

    def specs(self, shape: Shape, dtype: torch.dtype, stored: int | None = None) -> dict[str, Spec]:
        rows, columns = check_shape(shape)
        self._check_columns(columns)
        return {"blocks": Spec(Q4Layout(self.n, self.m).shape(rows, columns), torch.uint8)}

    def _check_columns(self, columns: int) -> None:
        if columns % self.m:
            raise ValueError(f"weight: expected input features divisible by {self.m} for format {self.name!r}, got {columns}")

    def _check_weight(self, weight: torch.Tensor) -> None:
        check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
        self._check_columns(weight.shape[1])

    def _multiply(self, x: torch.Tensor, tensors: Tensors, shape: Shape, bias: torch.Tensor | None) -> torch.Tensor:
        return Q4_LINEAR(x, tensors["blocks"], self.n, self.m, shape[0], bias)

    def _check_contents(self, tensors: Tensors, shape: Shape) -> None:
        check_q4(tensors["blocks"], self.n, self.m, shape[0], shape[1])


@dataclass(frozen=True)
class Int8(Format):
    """The format of 8-bit values and a scale for each row, without zeros left out: `layouts.int8_rows`.

    Packing rounds. The weight has no dtype of its own: its layer has one.
    """

    name = INT8
    tensor_names = ("values", "scales")
    typed = False

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
        values, scales = quantize_rows(weight.detach())
        return {"values": values, "scales": scales}

    def unpack(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return restore_rows(tensors["values"], tensors["scales"], dtype)

    def _multiply(self, x: torch.Tensor, tensors: Tensors, shape: Shape, bias: torch.Tensor | None) -> torch.Tensor:
        return INT8_LINEAR(x, tensors["values"], tensors["scales"], bias)

    def packed_bytes(self, weight: torch.Tensor) -> int:
        check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
        return sum(spec.nbytes for spec in self.specs((weight.shape[0], weight.shape[1]), weight.dtype).values())

    def specs(self, shape: Shape, dtype: torch.dtype, stored: int | None = None) -> dict[str, Spec]:
        rows, columns = check_shape(shape)
        return {"values": Spec((rows, columns), torch.int8), "scales": Spec((rows,), torch.float32)}

    def _check_contents(self, tensors: Tensors, shape: Shape) -> None:
        check_int8(tensors["values"], tensors["scales"])


def format_of(name: str) -> Format:
    """Return the format of a name: `"bitmask"`, `"N:M"` with M of at most 16, `"N:M-q4"` for 2:4, 1:4 and 4:16, or `"int8"`.

    Raises:
        ValueError: no format has this name.
    """
    if name == Bitmask.name:
        return Bitmask()
    if name == INT8:
        return Int8()
    plain = name.removesuffix(Q4) if isinstance(name, str) else ""
    if ":" not in plain or not isinstance(pattern := parse_pattern(plain), NM):
        raise ValueError(f"format: expected 'bitmask', 'N:M', 'N:M{Q4}' or 'int8', got {name!r}")
    return NMPacked(pattern.n, pattern.m) if plain == name else NMQ4Packed(pattern.n, pattern.m)


def q4_names(weight: torch.Tensor) -> tuple[str, ...]:
    """Return the formats of 4-bit values that may fit a weight, the smallest first."""
    fitting = [(n, m) for n, m in sorted(PATTERNS, key=lambda p: p[0] / p[1]) if weight.dim() == 2 and weight.shape[1] % m == 0]
    return tuple(f"{n}:{m}{Q4}" for n, m in fitting)
