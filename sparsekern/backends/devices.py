"""What several implementations ask of a device and of values on it."""

from __future__ import annotations

import torch

from .table import YES, Support
from .values import BadValues


def needs_capability(tensor: torch.Tensor, least: tuple[int, int]) -> Support:
    """Whether the CUDA device of `tensor` has that compute capability; a CPU, where only tests run kernels, has them all."""
    if not tensor.is_cuda:
        return YES
    found = torch.cuda.get_device_capability(tensor.device)
    if found >= least:
        return YES
    return Support(False, f"it needs compute capability {least[0]}.{least[1]}, and this device has {found[0]}.{found[1]}")


def refuse_not_finite(x: torch.Tensor, row_mask: torch.Tensor | None) -> None:
    """Raise `BadValues` if a row of `x` that is used holds a NaN or Inf."""
    good = x.isfinite().all(1)
    if not (good if row_mask is None else good | ~row_mask).all():
        raise BadValues("x: expected finite values")
