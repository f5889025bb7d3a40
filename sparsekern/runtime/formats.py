"""Formats of packed weights: pack a weight into a few named tensors, check them, and multiply by them.

Safetensors files hold these tensors unchanged, named after the arguments of the format's op. `config.json` holds the name of the
format, the shape and dtype of the weight, and for a bitmask `stored`. These determine the sizes of all tensors (`specs`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .._checks import HALF_OR_FLOAT, check_tensor
from .._counts import nonzeros_of_rows
from ..layouts import packed_rows as rows_layout
from ..layouts.nm_q4 import COLUMNS, PATTERNS, Q4Layout, check_q4
from ..layouts.q4_grid import grid_scales, is_on_grid
from ..ops import OPS
from ..ops.bitmask_pack import bitmask_pack
from ..ops.nm_linear import check_pattern
from ..ops.nm_pack import nm_pack
from ..ops.nm_q4_linear import check_q4_pattern
from ..ops.nm_q4_pack import nm_q4_pack
from ..pattern import NM, parse_pattern

BITMASK_LINEAR, BITMASK_UNPACK = OPS["bitmask_linear"].call, OPS["bitmask_unpack"].overload
NM_LINEAR, NM_UNPACK = OPS["nm_linear"].call, OPS["nm_unpack"].overload
Q4_LINEAR, Q4_UNPACK = OPS["nm_q4_linear"].call, OPS["nm_q4_unpack"].overload
Q4 = "-q4"  # ends the names of formats of 4-bit values

Tensors = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """The shape and dtype of one packed tensor.

    Attributes:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Format(ABC):
    """A packed format. In all methods, `shape` is that of the weight, `(out_features, in_features)` here, and `dtype` its dtype.

    Attributes:
        tensor_names: names of the packed tensors, which are arguments of the format's op.
    """

    tensor_names: tuple[str, ...]

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the format, such as `"2:4"`."""

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pack a weight into contiguous tensors on its device. `-0.0` counts as zero.

        Raises:
            TypeError: the weight has a dtype that cannot be packed.
            ValueError: the weight is not a matrix, or does not fit the format.
        """

    @abstractmethod
    def unpack(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight of packed tensors.

        Raises:
            ValueError: `check` refuses the tensors.
        """

    def linear(self, x: torch.Tensor, tensors: Tensors, shape: Shape, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute `x W^T + b` from tensors that passed `check`.

        It calls the op of this format without the checks of its wrapper.

        Raises:
            TypeError: `x` and the weight differ in dtype.
            ValueError: `x` and the weight differ in input features.
        """
        self.check_input(x, tensors, shape)
        return self._multiply(x, tensors, shape, bias)

    def check_input(self, x: torch.Tensor, tensors: Tensors, shape: Shape) -> None:
        """Raise `TypeError` or `ValueError` unless `x` has the weight's dtype and input features."""
        self._check_input_dtype(x, tensors)
        if x.dim() == 0 or x.shape[-1] != shape[1]:
            raise ValueError(f"x: expected {shape[1]} input features, got {x.shape[-1] if x.dim() else 'a scalar'}")

    def _check_input_dtype(self, x: torch.Tensor, tensors: Tensors) -> None:
        if x.dtype != tensors["values"].dtype:
            raise TypeError(f"x: expected {tensors['values'].dtype}, the dtype of the packed values, got {x.dtype}")

    @abstractmethod
    def packed_bytes(self, weight: torch.Tensor) -> int:
        """Return the bytes of the packed weight without packing it.

        Raises:
            TypeError: as in `pack`.
            ValueError: as in `pack`.
        """

    def stored_values(self, tensors: Tensors, shape: Shape) -> int:
        """Return the number of stored values: the non-zeros and the padding of the format."""
        return tensors["values"].numel()

    def stored(self, tensors: Tensors) -> int | None:
        """Return the number of stored values if `specs` needs it beside shape and dtype, else None."""
        return None

    @abstractmethod
    def specs(self, shape: Shape, dtype: torch.dtype, stored: int | None = None) -> dict[str, Spec]:
        """Return the shape and dtype of each packed tensor."""

    def empty(
        self, shape: Shape, dtype: torch.dtype, stored: int | None = None, device: torch.device | str | None = None
    ) -> dict[str, torch.Tensor]:
        """Return uninitialised tensors of the right sizes to load into."""
        return {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=device)
            for name, spec in self.specs(shape, dtype, stored).items()
        }

    def check(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> None:
        """Raise `ValueError`, naming the tensor and its fault, unless these are a packed weight of that shape and dtype.

        Everything that a kernel relies on is checked. Tensors from a file, which may be damaged or hostile, need this once.
        """
        self.check_names(tensors)
        self.check_shape(shape)
        self._check_sizes(tensors, shape, dtype)
        device = tensors[self.tensor_names[0]].device
        for name in self.tensor_names:
            if not tensors[name].is_contiguous() or tensors[name].device != device:
                raise ValueError(f"{name}: expected a contiguous tensor on {device}, got one on {tensors[name].device}")
        self._check_contents(tensors, shape)

    def check_shape(self, shape: Shape) -> Shape:
        """Return `shape` as a tuple; raise `ValueError` unless it is one of the weights that this format packs."""
        return check_shape(shape)

    def check_names(self, tensors: Tensors) -> None:
        """Raise `ValueError` unless the names are exactly those of the format."""
        if set(tensors) != set(self.tensor_names):
            raise ValueError(f"tensors: expected {', '.join(self.tensor_names)}, got {', '.join(sorted(tensors)) or 'none'}")

    @abstractmethod
    def _multiply(self, x: torch.Tensor, tensors: Tensors, shape: Shape, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x W^T + b` from tensors that passed `check`."""

    def _check_sizes(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> None:
        for name, spec in self.specs(shape, dtype, self.stored(tensors)).items():
            tensor = tensors[name]
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise ValueError(f"{name}: expected {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}")

    @abstractmethod
    def _check_contents(self, tensors: Tensors, shape: Shape) -> None:
        """Raise `ValueError` unless the tensors hold what packing makes."""


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

    def _check_input_dtype(self, x: torch.Tensor, tensors: Tensors) -> None:
        if x.dtype not in HALF_OR_FLOAT:
            raise TypeError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")

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


def check_shape(shape: Shape) -> tuple[int, int]:
    """Return `shape` as a tuple; raise `ValueError` unless it is two whole numbers of at least 0."""
    whole = isinstance(shape, (tuple, list)) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape
    )
    if not whole or len(shape) != 2:
        raise ValueError(f"shape: expected (out_features, in_features), got {shape!r}")
    rows, columns = shape
    return rows, columns


def format_of(name: str) -> Format:
    """Return the format of a name: `"bitmask"`, `"N:M"` with M of at most 16, or `"N:M-q4"` for 2:4, 1:4 and 4:16.

    Raises:
        ValueError: no format has this name.
    """
    if name == Bitmask.name:
        return Bitmask()
    plain = name.removesuffix(Q4) if isinstance(name, str) else ""
    if ":" not in plain or not isinstance(pattern := parse_pattern(plain), NM):
        raise ValueError(f"format: expected 'bitmask', 'N:M' or 'N:M{Q4}', got {name!r}")
    return NMPacked(pattern.n, pattern.m) if plain == name else NMQ4Packed(pattern.n, pattern.m)


def q4_names(weight: torch.Tensor) -> tuple[str, ...]:
    """Return the formats of 4-bit values that may fit a weight, the smallest first."""
    fitting = [(n, m) for n, m in sorted(PATTERNS, key=lambda p: p[0] / p[1]) if weight.dim() == 2 and weight.shape[1] % m == 0]
    return tuple(f"{n}:{m}{Q4}" for n, m in fitting)
