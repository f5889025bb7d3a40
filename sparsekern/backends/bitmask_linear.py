"""`bitmask_linear` on a CUDA device: the C++ kernel for few tokens, the Triton kernels, and the check of a weight at its first product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from ..layouts.packed_rows import WORD
from .decode import as_tokens, raw, supports_tokens
from .devices import Support, can_place_columns
from .implementation import Implementation
from .sound import Sound
from .values import raise_if, values_are_checked

_sound = Sound()


def _cuda(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    packed = values, bitmask, starts, order

    def product(status: torch.Tensor | None) -> torch.Tensor:
        return raw("bitmask_linear")(
            as_tokens(x, WORD),
            values.contiguous(),
            bitmask.contiguous(),
            starts.contiguous(),
            order.contiguous(),
            None if bias is None else bias.contiguous(),
            status,
        )

    y = _checked(product, x, *packed)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(order))


def _triton(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    from ..triton_kernels import bitmask_linear as kernels

    packed = values, bitmask, starts, order

    def product(status: torch.Tensor | None) -> torch.Tensor:
        weight = kernels.weight_of(*packed)
        if x.shape[:-1].numel() <= kernels.MOST_TOKENS:
            return kernels.product(x, weight, bias, status)
        return linear(x, kernels.unpacked(weight, x.shape[-1], status), bias)

    return _checked(product, x, *packed)


def _checked(product: Callable[[torch.Tensor | None], torch.Tensor], x: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
    """Return `product(status)`: at the first product of a weight with a status that the kernel sets, which is read; then with None."""
    if _sound.has(*packed) or not values_are_checked(x):
        return product(None)
    status = x.new_zeros((), dtype=torch.int32)
    y = product(status)
    raise_if(status)
    _sound.add(*packed)
    return y


def _supports_few(x: torch.Tensor, *args, **kwargs) -> Support:
    able = can_place_columns("x", x.shape[-1])
    return supports_tokens("bitmask_linear", x) if able.ok else able


def _supports(x: torch.Tensor, *args, **kwargs) -> Support:
    return can_place_columns("x", x.shape[-1])


IMPLEMENTATIONS = (Implementation("cuda", _cuda, _supports_few), Implementation("triton", _triton, _supports))
