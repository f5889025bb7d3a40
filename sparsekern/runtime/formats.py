"""The formats of packed weights: how a linear layer's weight becomes a few named tensors, is checked, and multiplies.

The tensors go to safetensors as they are. What `config.json` must hold to find them again is a format's name, the weight's shape and
dtype, and `stored` of a bitmask: the sizes of all tensors follow from these (`specs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..layouts import packed_rows as rows_layout
from ..ops._checks import HALF_OR_FLOAT, check_tensor
from ..ops._registry import OPS
from ..ops.nm_linear import check_pattern
from ..pattern import parse_pattern

BITMASK_LINEAR = OPS["bitmask_linear"].overload
NM_LINEAR = OPS["nm_linear"].overload

Tensors = Mapping[str, torch.Tensor]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one packed tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Format:
    """What every format does; `shape` is `(out_features, in_features)`, `dtype` that of the weight."""

    name: str
    tensor_names: tuple[str, ...]

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The packed tensors of a weight, contiguous and on its device. `-0.0` counts as zero.

        Raises:
            TypeError, ValueError: wrong dtype or dimensions, or a weight that the format does not hold.
        """
        raise NotImplementedError

    def unpack(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight of tensors that passed `check`."""
        raise NotImplementedError

    def linear(self, x: torch.Tensor, tensors: Tensors, shape: Shape, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x W^T + b` from tensors that passed `check`: the op of this format, without the checks of its wrapper.

        Raises:
            TypeError, ValueError: `x` has not the weight's dtype or input features.
        """
        self.check_input(x, tensors, shape)
        return self._multiply(x, tensors, bias)

    def check_input(self, x: torch.Tensor, tensors: Tensors, shape: Shape) -> None:
        """Raise `TypeError` or `ValueError` unless `x` has the weight's dtype and input features."""
        if x.dtype != tensors["values"].dtype:
            raise TypeError(f"x: expected {tensors['values'].dtype}, the dtype of the packed values, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != shape[1]:
            raise ValueError(f"x: expected {shape[1]} input features, got {x.shape[-1] if x.dim() else 'a scalar'}")

    def packed_bytes(self, weight: torch.Tensor) -> int:
        """What `pack` would take, without packing.

        Raises:
            TypeError, ValueError: as `pack`.
        """
        raise NotImplementedError

    def stored(self, tensors: Tensors) -> int | None:
        """What `specs` needs to know beside shape and dtype; None: nothing."""
        return None

    def specs(self, shape: Shape, dtype: torch.dtype, stored: int | None = None) -> dict[str, Spec]:
        """Shape and dtype of each packed tensor."""
        raise NotImplementedError

    def empty(self, shape: Shape, dtype: torch.dtype, stored: int | None = None, device=None) -> dict[str, torch.Tensor]:
        """Uninitialised tensors of the right sizes, to be loaded into."""
        return {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=device)
            for name, spec in self.specs(shape, dtype, stored).items()
        }

    def check(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> None:
        """Raise `ValueError`, naming the tensor and what is wrong with it, unless these are a packed weight of that shape and dtype.

        Everything that a kernel relies on is checked, so what comes from a damaged or hostile file is to be checked once.
        """
        self.check_names(tensors)
        check_shape(shape)
        self._check_sizes(tensors, shape, dtype)
        device = tensors[self.tensor_names[0]].device
        for name in self.tensor_names:
            if not tensors[name].is_contiguous() or tensors[name].device != device:
                raise ValueError(f"{name}: expected a contiguous tensor on {device}, got one on {tensors[name].device}")
        self._check_contents(tensors, shape)

    def check_names(self, tensors: Tensors) -> None:
        """Raise `ValueError` unless there is a tensor of each name and no other."""
        if set(tensors) != set(self.tensor_names):
            raise ValueError(f"tensors: expected {', '.join(self.tensor_names)}, got {', '.join(sorted(tensors)) or 'none'}")

    def _multiply(self, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    def _check_sizes(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> None:
        for name, spec in self.specs(shape, dtype, self.stored(tensors)).items():
            tensor = tensors[name]
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise ValueError(f"{name}: expected {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}")

    def _check_contents(self, tensors: Tensors, shape: Shape) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Bitmask(Format):
    """The non-zeros and one bit a weight, for any sparsity: see `sparsekern.layouts.packed_rows`, bitmask rows."""

    name = "bitmask"
    tensor_names = ("values", "bitmask", "starts", "order")

    def pack(self, weight):
        check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
        return rows_layout.pack_bitmask_rows(weight.detach())

    def unpack(self, tensors, shape, dtype):
        return rows_layout.unpack_bitmask_rows(tensors["values"], tensors["bitmask"], tensors["order"], shape[1])

    def _multiply(self, x, tensors, bias):
        return BITMASK_LINEAR(x, tensors["values"], tensors["bitmask"], tensors["starts"], tensors["order"], bias)

    def packed_bytes(self, weight):
        check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
        counts = (weight != 0).sum(1).sort().values
        units = int(rows_layout.unit_counts(counts, weight.dtype).sum()) + rows_layout.SLACK
        specs = self.specs(tuple(weight.shape), weight.dtype, units * rows_layout.lanes(weight.dtype))
        return sum(spec.nbytes for spec in specs.values())

    def stored(self, tensors):
        return tensors["values"].numel()

    def specs(self, shape, dtype, stored=None):
        if isinstance(stored, bool) or not isinstance(stored, int) or stored < 0:
            raise ValueError(f"stored: expected the number of values of a bitmask, got {stored!r}")
        rows, columns = check_shape(shape)
        return {
            "values": Spec((stored,), dtype),
            "bitmask": Spec((rows, rows_layout.words(columns)), torch.int64),
            "starts": Spec((-(-rows // rows_layout.TILE_ROWS) + 1,), torch.int64),
            "order": Spec((rows,), torch.int32),
        }

    def _check_contents(self, tensors, shape):
        rows, columns = shape
        values, bitmask, starts, order = (tensors[name] for name in self.tensor_names)
        flags = rows_layout.words_to_bits(bitmask)
        stray = flags[:, columns:].any(1)
        if stray.any():
            raise ValueError(f"bitmask: expected zeros past column {columns - 1}, got a set bit in row {int(stray.nonzero()[0])}")
        counts = flags.sum(1)
        units = rows_layout.unit_counts(counts, values.dtype)
        expected = (int(units.sum()) + rows_layout.SLACK) * rows_layout.lanes(values.dtype)
        if values.numel() != expected:
            raise ValueError(f"values: expected {expected} values for the bits set in bitmask, got {values.numel()}")
        wrong = starts != rows_layout.tile_starts(units, values.dtype)
        if wrong.any():
            tile = int(wrong.nonzero()[0])
            raise ValueError(f"starts: expected where the bits set before each tile end, got {int(starts[tile])} for tile {tile}")
        if not torch.equal(order.sort().values, torch.arange(rows, dtype=torch.int32, device=order.device)):
            raise ValueError(f"order: expected each row from 0 to {rows - 1} once")


@dataclass(frozen=True)
class NMPacked(Format):
    """N values of every M inputs and their positions, `M <= 16`: see `sparsekern.layouts.packed_rows`, N:M rows."""

    n: int
    m: int
    tensor_names = ("values", "codes")

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m)

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    def pack(self, weight):
        self._check_weight(weight)
        return rows_layout.pack_nm_rows(weight.detach(), self.n, self.m)

    def unpack(self, tensors, shape, dtype):
        return rows_layout.unpack_nm_rows(tensors["values"], tensors["codes"], self.n, self.m, shape[1])

    def _multiply(self, x, tensors, bias):
        return NM_LINEAR(x, tensors["values"], tensors["codes"], self.n, self.m, bias)

    def packed_bytes(self, weight):
        self._check_weight(weight)
        return sum(spec.nbytes for spec in self.specs(tuple(weight.shape), weight.dtype).values())

    def specs(self, shape, dtype, stored=None):
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
        rows, columns = weight.shape
        self._check_columns(columns)
        counts = (weight.reshape(rows, columns // self.m, self.m) != 0).sum(-1)
        if counts.numel() and int(counts.max()) > self.n:
            row, group = (int(i) for i in (counts > self.n).nonzero()[0])
            first = group * self.m
            raise ValueError(
                f"weight: expected at most {self.n} non-zeros in every {self.m} inputs, got {int(counts[row, group])} in row {row}, "
                f"columns {first} to {first + self.m - 1}"
            )

    def _check_contents(self, tensors, shape):
        rows, columns = shape
        place = rows_layout.positions(tensors["codes"], self.m)
        kept = columns // self.m * self.n
        if place[:, kept:].any():
            raise ValueError(f"codes: expected zeros after the {kept} positions of a row")
        if rows_layout.fill_of(tensors["values"], kept).any():  # NaN counts; it would reach every output of the row
            raise ValueError(f"values: expected zeros after the {kept} values of a row")
        place = place[:, :kept].view(rows, columns // self.m, self.n)
        wrong = (place >= self.m).any(-1) | (place.diff(dim=-1) <= 0).any(-1)
        if wrong.any():
            row, group = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"codes: expected {self.n} ascending positions below {self.m} in every group, got {place[row, group].tolist()} in row "
                f"{row}, group {group}"
            )


def check_shape(shape: Shape) -> Shape:
    """Raise `ValueError` unless `shape` is two whole numbers of at least 0."""
    whole = isinstance(shape, (tuple, list)) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape
    )
    if not whole or len(shape) != 2:
        raise ValueError(f"shape: expected (out_features, in_features), got {shape!r}")
    return tuple(shape)


def format_of(name: str) -> Format:
    """The format of a name: `"bitmask"`, or `"N:M"` with M of at most 16 (keep N of every M).

    Raises:
        TypeError, ValueError: no format has this name.
    """
    if name == Bitmask.name:
        return Bitmask()
    if not isinstance(name, str) or ":" not in name:
        raise ValueError(f"format: expected 'bitmask' or 'N:M', got {name!r}")
    pattern = parse_pattern(name)
    return NMPacked(pattern.n, pattern.m)
