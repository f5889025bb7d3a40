"""What a device must be for an implementation to run on it."""

from __future__ import annotations

import torch

from .table import YES, Support


def needs_capability(tensor: torch.Tensor, least: tuple[int, int]) -> Support:
    """Whether the CUDA device of `tensor` has that compute capability; a CPU, where only tests run kernels, has them all."""
    if not tensor.is_cuda:
        return YES
    found = torch.cuda.get_device_capability(tensor.device)
    if found >= least:
        return YES
    return Support(False, f"it needs compute capability {least[0]}.{least[1]}, and this device has {found[0]}.{found[1]}")
