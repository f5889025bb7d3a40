"""`nm_linear` on a CUDA device: the Triton kernel for few tokens, a dense product for many."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .devices import Support, can_place_columns
from .implementation import Implementation


def _triton(
    x: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, n: int, m: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    from ..triton_kernels import nm_linear

    values, codes = values.contiguous(), codes.contiguous()
    if x.shape[:-1].numel() <= nm_linear.MOST_TOKENS:
        return nm_linear.product(x, values, codes, n, m, bias)
    return linear(x, nm_linear.unpacked(values, codes, n, m, x.shape[-1]), bias)


def _supports(x: torch.Tensor, *args, **kwargs) -> Support:
    return can_place_columns("x", x.shape[-1])


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
