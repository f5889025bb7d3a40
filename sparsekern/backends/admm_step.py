"""`admm_step_` on a CUDA device: a Triton pass, the selection by another op, and a second Triton pass."""

from __future__ import annotations

import torch

from .implementation import Implementation
from .values import BadValues, value_checks, values_are_checked


def _triton(
    offset: torch.Tensor,
    dual: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    *,
    n: int = 0,
    m: int = 0,
    k: int = 0,
    scope: str = "matrix",
) -> torch.Tensor:
    from ..triton_kernels import admm_step

    state = offset, dual, mask
    dense = offset.contiguous(), dual.contiguous(), mask.contiguous()
    weight = weight.contiguous()
    found = admm_step.magnitudes_of(dense[0], dense[1], weight)
    if values_are_checked(weight) and int(found.suspect):
        raise BadValues("offset, dual, weight: expected finite values")
    with value_checks(False):  # a NaN has been ruled out above
        if n:
            kept = torch.ops.sparsekern.nm_mask(found.values, n, m)
        else:
            kept = torch.ops.sparsekern.topk_mask(found.values, k, scope=scope)
    changed = admm_step.take_step_(*dense, weight, kept)
    for tensor, new in zip(state, dense, strict=True):
        if tensor is not new:
            tensor.copy_(new)
    return changed


IMPLEMENTATIONS = (Implementation("triton", _triton),)
