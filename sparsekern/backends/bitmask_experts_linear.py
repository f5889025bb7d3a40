"""`bitmask_experts_linear` on a CUDA device: the Triton kernel, and the check of packed experts at their first product."""

from __future__ import annotations

import torch

from .devices import Support, can_group_pairs, can_place_columns
from .implementation import Implementation
from .sound import Sound
from .values import BadValues, raise_if, values_are_checked

_sound = Sound()


def _triton(
    x: torch.Tensor,
    experts: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    from ..triton_kernels.bitmask_experts_linear import product
    from ..triton_kernels.bitmask_linear import weight_of

    if experts.numel() and not len(order):
        raise BadValues("experts: expected none of the ids, since there are no experts")
    check = values_are_checked(x) and not _sound.has(values, starts, bitmask, order)
    status = x.new_zeros((), dtype=torch.int32) if check else None
    y = product(x, experts, weight_of(values, bitmask, starts, order), bias, status)
    if status is not None:
        raise_if(status)
    if check and y.numel():
        _sound.add(values, starts, bitmask, order)
    return y


def _supports(x: torch.Tensor, experts: torch.Tensor, values, bitmask, starts, order: torch.Tensor, bias=None) -> Support:
    columns = can_place_columns("x", x.shape[-1])
    return can_group_pairs(experts, len(order)) if columns.ok else columns


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
