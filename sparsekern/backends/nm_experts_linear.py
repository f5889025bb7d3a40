"""`nm_experts_linear` on a CUDA device: the Triton kernel, and the check of the first ids that packed experts are asked for."""

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
    codes: torch.Tensor,
    n: int,
    m: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    from ..triton_kernels.nm_experts_linear import product

    if experts.numel() and not len(values):
        raise BadValues("experts: expected none of the ids, since there are no experts")
    check = values_are_checked(x) and not _sound.has(values, codes)
    status = x.new_zeros((), dtype=torch.int32) if check else None
    y = product(x, experts, values.contiguous(), codes.contiguous(), n, m, bias, status)
    if status is not None:
        raise_if(status)
    if check and y.numel():
        _sound.add(values, codes)
    return y


def _supports(x: torch.Tensor, experts: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> Support:
    columns = can_place_columns("x", x.shape[-1])
    return can_group_pairs(experts, len(values)) if columns.ok else columns


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
