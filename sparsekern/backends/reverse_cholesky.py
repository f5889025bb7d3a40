"""`reverse_cholesky` on a CUDA device: one attempt with cuSOLVER; a failed one is left to the reference."""

from __future__ import annotations

import torch

from .implementation import Implementation
from .values import BadValues, LeftToReference

# Factorisations run one at a time, not on several streams. The host reads the result of each, and then the damping, the shift and every
# linear's error, so that nothing would overlap. PyTorch also has one cuSOLVER handle per thread and device. cuBLAS guarantees the same
# bits from one handle only while a single stream is active, and a resumed run must get the same bits.


def _triton(gram: torch.Tensor, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.reverse_cholesky import attempt

    if not len(gram):
        raise LeftToReference("an empty matrix")
    found = attempt(gram, damping)
    # Read even if value checks are off: a failed factorisation must not be used.
    failed, not_finite = torch.stack((found.failed, found.not_finite)).tolist()
    if not_finite:
        raise BadValues("gram: expected finite values")
    if failed:
        raise LeftToReference("the matrix is indefinite: it needs more damping, or float64")
    return found.factor, torch.full((), damping, dtype=torch.float64, device=gram.device)


IMPLEMENTATIONS = (Implementation("triton", _triton),)
