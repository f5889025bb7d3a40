"""`bitmask_unpack` on a CUDA device: the check of the packed tensors, and the Triton kernel."""

from __future__ import annotations

import torch

from ..layouts.packed_rows import check_bitmask_rows
from .devices import Support, can_place_columns
from .implementation import Implementation
from .values import values_are_checked


def _triton(values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, order: torch.Tensor, features: int) -> torch.Tensor:
    from ..triton_kernels import bitmask_linear as kernels

    if values_are_checked(values):
        check_bitmask_rows(values, bitmask, starts, order, features)
    return kernels.unpacked(kernels.weight_of(values, bitmask, starts, order), features, None)


def _supports(values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, order: torch.Tensor, features: int) -> Support:
    return can_place_columns("the weight", features)


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
