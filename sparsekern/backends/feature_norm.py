from __future__ import annotations

import torch

from .devices import needs_capability, refuse_not_finite
from .table import Implementation, Support
from .values import values_are_checked


def _triton(
    sum_squares: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None, sum: torch.Tensor | None = None
) -> None:
    from ..triton_kernels import feature_norm

    found = feature_norm.partial_sums(x, row_mask=row_mask, both=sum is not None)
    # A NaN or Inf makes a sum one too; so may values that are too large to be squared, which are no error.
    if values_are_checked(x) and int(found.suspect):
        refuse_not_finite(x, row_mask)
    feature_norm.add_(sum_squares, found.sums[:, 0])
    if sum is not None:
        feature_norm.add_(sum, found.sums[:, 1])


def _supports(sum_squares: torch.Tensor, *args, **kwargs) -> Support:
    return needs_capability(sum_squares, (8, 0))


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
