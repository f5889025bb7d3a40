"""`nm_unpack` on a CUDA device: the check of the packed tensors, and the Triton kernel."""

from __future__ import annotations

import torch

from ..layouts.packed_rows import check_nm_rows
from .devices import Support, can_place_columns
from .implementation import Implementation
from .values import values_are_checked


def _triton(values: torch.Tensor, codes: torch.Tensor, n: int, m: int, features: int) -> torch.Tensor:
    from ..triton_kernels import nm_linear as kernels

    if values_are_checked(values):
        check_nm_rows(values, codes, n, m, features)
    return kernels.unpacked(values.contiguous(), codes.contiguous(), n, m, features)


def _supports(values: torch.Tensor, codes: torch.Tensor, n: int, m: int, features: int) -> Support:
    return can_place_columns("the weight", features)


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
