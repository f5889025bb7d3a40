from __future__ import annotations

import torch

from .table import Implementation
from .values import BadValues, LeftToReference

# One factorisation at a time, not several on streams of their own. The host reads the outcome of each, and then the damping, the shift
# and every linear's error, so that nothing would be in flight beside it. And PyTorch has one cuSOLVER handle a thread and device, while
# cuBLAS promises the same bits from one handle only where a single stream is active, and a resumed run has to get the same bits.


def _triton(gram: torch.Tensor, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.reverse_cholesky import attempt

    if not len(gram):
        raise LeftToReference("an empty matrix")
    found = attempt(gram, damping)
    # Read whether or not values are checked: a factorisation that failed must not be taken for one.
    failed, not_finite = torch.stack((found.failed, found.not_finite)).tolist()
    if not_finite:
        raise BadValues("gram: expected finite values")
    if failed:
        raise LeftToReference("the matrix is indefinite: more damping, or float64, is called for")
    return found.factor, torch.full((), damping, dtype=torch.float64, device=gram.device)


IMPLEMENTATIONS = (Implementation("triton", _triton),)
