"""`bitmask_linear` on a CUDA device: the Triton kernels, and the check of a packed weight at its first product."""

from __future__ import annotations

import weakref

import torch
from torch.nn.functional import linear
from torch.utils.weak import WeakIdKeyDictionary

from .devices import Support, can_place_columns
from .implementation import Implementation
from .values import raise_if, values_are_checked

# Checking the packed tensors waits for the device, which must not happen for every token. Only the first product of a weight is checked.
# Keyed by `starts`: the other tensors with which it was found consistent. If they are overwritten later, kernels still stay inside them.
_sound: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _triton(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    from ..triton_kernels import bitmask_linear as kernels

    check = values_are_checked(x) and not _known(values, bitmask, starts, order)
    status = x.new_zeros((), dtype=torch.int32) if check else None
    weight = kernels.weight_of(values, bitmask, starts, order)
    if x.shape[:-1].numel() <= kernels.MOST_TOKENS:
        y = kernels.product(x, weight, bias, status)
    else:
        y = linear(x, kernels.unpacked(weight, x.shape[-1], status), bias)
    if status is not None:
        raise_if(status)
        _sound[starts] = len(values), weakref.ref(bitmask), weakref.ref(order)
    return y


def _known(values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, order: torch.Tensor) -> bool:
    count, its_bitmask, its_order = _sound.get(starts, (None, None, None))
    return count == len(values) and its_bitmask() is bitmask and its_order() is order


def _supports(x: torch.Tensor, *args, **kwargs) -> Support:
    return can_place_columns("x", x.shape[-1])


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
