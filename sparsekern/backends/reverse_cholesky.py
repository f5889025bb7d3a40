"""`reverse_cholesky` on a CUDA device: one attempt with cuSOLVER; a failed one is left to the reference.

A batch is one attempt at all of its matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .implementation import Implementation
from .values import BadValues, LeftToReference

# Factorisations run one at a time, not on several streams. The host reads the result of each, and then the damping, the shift and every
# linear's error, so that nothing would overlap. PyTorch also has one cuSOLVER handle per thread and device. cuBLAS guarantees the same
# bits from one handle only while a single stream is active, and a resumed run must get the same bits.


def _triton(gram: torch.Tensor, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.reverse_cholesky import attempt

    if not gram.numel():
        raise LeftToReference("an empty matrix")
    found = attempt(gram, damping)
    # Read even if value checks are off: a failed factorisation must not be used.
    failed, not_finite = torch.stack((found.failed, found.not_finite)).view(2, -1).tolist()
    if any(not_finite):
        raise BadValues("gram: expected finite values")
    damping_used = torch.full(gram.shape[:-2], damping, dtype=torch.float64, device=gram.device)
    if any(failed):
        if gram.dim() == 2:
            raise LeftToReference("the matrix is indefinite: it needs more damping, or float64")
        _repeat(gram, damping, found.factor, damping_used, [index for index, bad in enumerate(failed) if bad])
    return found.factor, damping_used


def _repeat(gram: torch.Tensor, damping: float, factor: torch.Tensor, used: torch.Tensor, indices: Sequence[int]) -> None:
    """Factor some matrices of a batch again, each alone, so that the reference mends them."""
    for index in indices:
        try:
            factor[index], used[index] = torch.ops.sparsekern.reverse_cholesky(gram[index], damping)
        except ValueError as error:
            raise LeftToReference("the reference names the matrix of the batch") from error


IMPLEMENTATIONS = (Implementation("triton", _triton),)
