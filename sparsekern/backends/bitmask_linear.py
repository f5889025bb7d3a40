"""`bitmask_linear` on a CUDA device: the Triton kernels, and the check of a packed weight at its first product."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .devices import Support, can_place_columns
from .implementation import Implementation
from .sound import Sound
from .values import raise_if, values_are_checked

_sound = Sound()


def _triton(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    from ..triton_kernels import bitmask_linear as kernels

    check = values_are_checked(x) and not _sound.has(values, starts, bitmask, order)
    status = x.new_zeros((), dtype=torch.int32) if check else None
    weight = kernels.weight_of(values, bitmask, starts, order)
    if x.shape[:-1].numel() <= kernels.MOST_TOKENS:
        y = kernels.product(x, weight, bias, status)
    else:
        y = linear(x, kernels.unpacked(weight, x.shape[-1], status), bias)
    if status is not None:
        raise_if(status)
        _sound.add(values, starts, bitmask, order)
    return y


def _supports(x: torch.Tensor, *args, **kwargs) -> Support:
    return can_place_columns("x", x.shape[-1])


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
