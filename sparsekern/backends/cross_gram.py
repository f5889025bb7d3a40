"""`cross_gram_` on a CUDA device: the Triton kernel, and the check of its result for NaN and Inf."""

from __future__ import annotations

import torch

from .implementation import Implementation
from .values import refuse_not_finite, values_are_checked


def _triton(
    cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *, row_mask: torch.Tensor | None = None, alpha: float = 1.0
) -> None:
    from ..triton_kernels.cross_gram import cross_gram_

    cross_gram_(cross, x, y, row_mask=row_mask, alpha=alpha)
    # A NaN or Inf in a feature spreads to its whole row or column of the result.
    if values_are_checked(cross) and not (cross[:, :1].isfinite().all() & cross[:1].isfinite().all()):
        refuse_not_finite(x, row_mask)
        refuse_not_finite(y, row_mask)


IMPLEMENTATIONS = (Implementation("triton", _triton),)
