"""What every format of packed weights does: pack a weight into a few named tensors, check them, and multiply by them.

Safetensors files hold these tensors unchanged, named after the arguments of the format's op. `config.json` holds the name of the
format, the shape and dtype of the weight, and for a bitmask `stored`. These determine the sizes of all tensors (`specs`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from .._checks import HALF_OR_FLOAT
from .._counts import nonzeros

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
        typed: whether the values have the dtype of the weight, and of what is multiplied by it.
    """

    tensor_names: tuple[str, ...]
    typed: ClassVar[bool] = True

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
        if not self.typed:
            if x.dtype not in HALF_OR_FLOAT:
                raise TypeError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
        elif x.dtype != tensors["values"].dtype:
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

    def nonzeros(self, tensors: Tensors, shape: Shape) -> int:
        """Return the number of weights that are not zero."""
        return int(nonzeros(self.unpack(tensors, shape, torch.float32)))

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


def check_shape(shape: Shape) -> tuple[int, int]:
    """Return `shape` as a tuple; raise `ValueError` unless it is two whole numbers of at least 0."""
    whole = isinstance(shape, (tuple, list)) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape
    )
    if not whole or len(shape) != 2:
        raise ValueError(f"shape: expected (out_features, in_features), got {shape!r}")
    rows, columns = shape
    return rows, columns
