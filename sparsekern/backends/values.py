"""How a kernel on a CUDA device says that a value was NaN, infinite or otherwise not to be had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_enabled = ContextVar("sparsekern_value_checks", default=True)


class BadValues(ValueError):
    """A kernel met values that its op refuses. The dispatcher turns this into the error of the reference, which names the place."""


class LeftToReference(Exception):
    """An implementation has come upon a case that is the reference's to handle, too rare to be worth a kernel. Nothing is changed."""


@contextmanager
def value_checks(enabled: bool) -> Iterator[None]:
    """Switch the checks of values on CUDA devices off (or on again) inside a `with` block.

    Each check waits for the device once. Without them a NaN or Inf goes through an op unnoticed; shapes and dtypes are always
    checked. While a stream is captured into a CUDA graph they are off by themselves. The CPU kernels always check.
    """
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def values_are_checked(tensor: torch.Tensor) -> bool:
    """Whether a kernel on the device of `tensor` is to look at its status now, which waits for the device."""
    return _enabled.get() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def raise_if(status: torch.Tensor) -> None:
    """Raise `BadValues` if a kernel has set a bit of `status`, an int32 on its device. Does nothing where checks are off."""
    if values_are_checked(status) and int(status):
        raise BadValues(f"a kernel refused a value (status {int(status)})")


def refuse_not_finite(x: torch.Tensor, row_mask: torch.Tensor | None) -> None:
    """Raise `BadValues` if a row of `x` that is used holds a NaN or Inf."""
    good = x.isfinite().all(1)
    if not (good if row_mask is None else good | ~row_mask).all():
        raise BadValues("x: expected finite values")
