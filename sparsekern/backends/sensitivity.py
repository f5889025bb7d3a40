"""`sensitivity_` on a CUDA device: the Triton kernels, and the check of the outputs for NaN and Inf."""

from __future__ import annotations

import torch

from .implementation import Implementation
from .values import BadValues, refuse_not_finite, values_are_checked


def _triton(importance: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None) -> None:
    from ..triton_kernels import sensitivity

    status = sensitivity.add_(importance, weight, x, row_mask=row_mask, checked=values_are_checked(x))
    if status is None:
        return
    refused, suspect = status.tolist()
    if refused:
        raise BadValues("weight, x: expected finite values")
    if suspect:  # an output overflowed, or a sum did, which is not an error
        for part in sensitivity.outputs_of(weight.detach(), x.detach()):
            refuse_not_finite(part.values, None if row_mask is None else row_mask[part.tokens])


IMPLEMENTATIONS = (Implementation("triton", _triton),)
