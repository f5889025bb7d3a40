"""Reporting of invalid values (NaN, Inf, inconsistent packed tensors) by CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_enabled = ContextVar("sparsekern_value_checks", default=True)


class BadValues(ValueError):
    """A kernel found values that its op refuses. The dispatcher then raises the error of the reference, which names the place."""


class LeftToReference(Exception):
    """An implementation leaves a case, too rare to be worth a kernel, to the reference. It has changed no argument."""


@contextmanager
def value_checks(enabled: bool) -> Iterator[None]:
    """Switch the checks of values on CUDA devices off (or on again) inside a `with` block.

    Each check waits for the device once. Without checks, a NaN or Inf passes through an op unnoticed; shapes and dtypes are always
    checked. Checks are off while a stream is captured into a CUDA graph. CPU kernels always check.
    """
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def values_are_checked(tensor: torch.Tensor) -> bool:
    """Return whether a kernel on the device of `tensor` should check its status now, which waits for the device."""
    return _enabled.get() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def raise_if(status: torch.Tensor) -> None:
    """Raise `BadValues` if a kernel has set a bit of `status`, an int32 on its device; do nothing if checks are off."""
    if values_are_checked(status) and int(status):
        raise BadValues(f"a kernel refused a value (status {int(status)})")


def refuse_not_finite(x: torch.Tensor, row_mask: torch.Tensor | None) -> None:
    """Raise `BadValues` if a used row of `x` has a NaN or Inf."""
    good = x.isfinite().all(1)
    if not (good if row_mask is None else good | ~row_mask).all():
        raise BadValues("x: expected finite values")
