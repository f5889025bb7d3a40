from __future__ import annotations

import torch

from .devices import needs_capability, refuse_not_finite
from .table import Implementation, Support
from .values import BadValues, values_are_checked


def _triton(importance: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None) -> None:
    from ..triton_kernels import sensitivity

    status = sensitivity.add_(importance, weight, x, row_mask=row_mask, checked=values_are_checked(x))
    if status is None:
        return
    refused, suspect = status.tolist()
    if refused:
        raise BadValues("weight, x: expected finite values")
    if suspect:  # outputs that overflow, or sums that do, which is no error
        for part in sensitivity.outputs_of(weight.detach(), x.detach()):
            refuse_not_finite(part.values, None if row_mask is None else row_mask[part.tokens])


def _supports(importance: torch.Tensor, *args, **kwargs) -> Support:
    return needs_capability(importance, (8, 0))


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
