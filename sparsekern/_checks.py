"""Argument checks. Their errors name the argument, the expected value and the given one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch

MOST_ELEMENTS = 2**40  # no memory holds more: only an empty shape, or strides of zero, can have them
HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    value: torch.Tensor,
    *,
    ndim: int,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise unless `value` has the given dimensions, dtype, sizes and device.

    Args:
        name: of the argument, for errors.
        value: the argument.
        ndim: number of dimensions.
        dtypes: allowed dtypes.
        shape: expected sizes; None in it allows any.
        device: expected device; None allows any.

    Raises:
        TypeError: no tensor, another dtype, or another layout than strided (sparse, mkldnn), which no kernel reads.
        ValueError: other dimensions, sizes or device; or a shape that no memory holds (empty, or with strides of zero), in which a
            kernel would loop or overflow.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {str(value.layout).removeprefix('torch.')}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {_name(value.dtype)}")
    given = value.shape
    if len(given) != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(given)}")
    if not torch.compiler.is_compiling() and _elements(value) > MOST_ELEMENTS:
        raise ValueError(f"{name}: expected a shape that memory can hold, got {tuple(given)}")
    if shape is not None:
        for size, expected in zip(given, shape, strict=True):
            if expected is not None and size != expected:
                sizes = tuple("any" if s is None else s for s in shape)
                raise ValueError(f"{name}: expected shape {sizes}, got {tuple(given)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_square(name: str, value: torch.Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,), ndim: int = 2) -> None:
    """Raise `TypeError` or `ValueError` unless `value` is a square matrix of one of `dtypes`, or with `ndim=3` a batch of them."""
    check_tensor(name, value, ndim=ndim, dtypes=dtypes)
    if value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{name}: expected a square matrix, got shape {tuple(value.shape)}")


def dimensions(value: object, of_one: int) -> int:
    """Return the dimensions to expect of an argument that may be a batch: one more than `of_one` if `value` has them."""
    return of_one + 1 if isinstance(value, torch.Tensor) and value.dim() == of_one + 1 else of_one


def check_whole(name: str, value: int, least: int | None = None) -> None:
    """Raise `TypeError` or `ValueError` unless `value` is a whole number of at least `least`; numpy and traced numbers are allowed."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_finite_number(name: str, value: float, least: float = -math.inf) -> None:
    """Raise `TypeError` or `ValueError` unless `value` is a finite number of at least `least`; traced numbers are allowed."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least:g}, got {value}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_row_mask(row_mask: torch.Tensor | None, x: torch.Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `row_mask` is None or a bool for each row of `x`."""
    if row_mask is not None:
        check_tensor("row_mask", row_mask, ndim=1, dtypes=(torch.bool,), shape=(x.shape[0],), device=x.device)


def check_finite(name: str, value: torch.Tensor, row_mask: torch.Tensor | None = None) -> None:
    """Raise `ValueError` naming the first NaN or Inf of a tensor; rows of a matrix that `row_mask` drops are ignored."""
    if value.sum(dtype=torch.float32).isfinite():  # one read; the sum is not finite if a value is not
        return
    bad = ~torch.isfinite(value)
    if row_mask is not None:
        bad &= row_mask[:, None]
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}: expected finite values, got {float(value[tuple(place)])} at {place}")


def check_no_nan(name: str, value: torch.Tensor) -> None:
    """Raise `ValueError` naming the first NaN of a tensor; infinities are allowed, since they can be ordered."""
    bad = torch.isnan(value)
    if bad.any():
        raise ValueError(f"{name}: expected no NaN, got nan at {bad.nonzero()[0].tolist()}")


def _elements(value: torch.Tensor) -> int:
    """Return the number of elements, counting empty axes, and traced axes without a size, as one."""
    count = value.numel()
    return count if type(count) is int and count else math.prod(size for size in value.shape if type(size) is int and size)


def value_of(result: torch.Tensor) -> float | None:
    """Return the number in a 0-dim result; None if it holds none, because it is compiled, fake or on the meta device."""
    values = values_of(result)
    return None if values is None else values[0]


def values_of(result: torch.Tensor) -> list[float] | None:
    """Return all numbers of a result in order; None if it holds none, because it is compiled, fake or on the meta device."""
    if torch.compiler.is_compiling() or result.is_meta or isinstance(result, torch._subclasses.FakeTensor):
        return None
    return result.detach().reshape(-1).tolist()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(_name(d) for d in dtypes)


def on_one_line(error: BaseException) -> str:
    """Return the message of an error on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
