"""`gram_` on a CUDA device: the Triton kernel, and the check of the diagonal for NaN and Inf."""

from __future__ import annotations

import torch

from .implementation import Implementation
from .values import refuse_not_finite, values_are_checked


def _triton(gram: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None, alpha: float = 1.0) -> None:
    from ..triton_kernels.gram import gram_

    gram_(gram, x, row_mask=row_mask, alpha=alpha)
    # A NaN or Inf in a feature makes its diagonal element not finite, so that `x` is read again only in case of an error.
    if values_are_checked(gram) and not gram.diagonal().isfinite().all():
        refuse_not_finite(x, row_mask)


IMPLEMENTATIONS = (Implementation("triton", _triton),)
