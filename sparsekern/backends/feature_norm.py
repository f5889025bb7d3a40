"""`feature_norm_` on a CUDA device: the Triton kernels, and the check of their sums for NaN and Inf."""

from __future__ import annotations

import torch

from .implementation import Implementation
from .values import refuse_not_finite, values_are_checked


def _triton(
    sum_squares: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None, sum: torch.Tensor | None = None
) -> None:
    from ..triton_kernels import feature_norm

    found = feature_norm.partial_sums(x, row_mask=row_mask, both=sum is not None)
    # A NaN or Inf makes its sum not finite. So do values whose squares overflow, which are not errors.
    if values_are_checked(x) and int(found.suspect):
        refuse_not_finite(x, row_mask)
    feature_norm.add_(sum_squares, found.sums[:, 0])
    if sum is not None:
        feature_norm.add_(sum, found.sums[:, 1])


IMPLEMENTATIONS = (Implementation("triton", _triton),)
