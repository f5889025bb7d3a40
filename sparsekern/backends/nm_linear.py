"""`nm_linear` on a CUDA device: the C++ kernel for few tokens and 2:4 or 1:4, Triton's for other patterns, a dense product for many."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .decode import as_tokens, raw, supports_tokens
from .devices import Support, can_place_columns
from .implementation import Implementation

PART_COLUMNS = {2: 128, 1: 256}  # of the C++ kernel, which takes whole parts of 64 values, by the values kept of four


def _cuda(
    x: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, n: int, m: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y = raw("nm_linear")(
        as_tokens(x, PART_COLUMNS[n]), values.contiguous(), codes.contiguous(), n, None if bias is None else bias.contiguous()
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(values))


def _triton(
    x: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, n: int, m: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    from ..triton_kernels import nm_linear

    values, codes = values.contiguous(), codes.contiguous()
    if x.shape[:-1].numel() <= nm_linear.MOST_TOKENS:
        return nm_linear.product(x, values, codes, n, m, bias)
    return linear(x, nm_linear.unpacked(values, codes, n, m, x.shape[-1]), bias)


def _supports_few(x: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, n: int, m: int, *args, **kwargs) -> Support:
    if m != 4 or n not in PART_COLUMNS:
        return Support(False, f"the pattern is {n}:{m}, not 2:4 or 1:4")
    if x.shape[-1] % PART_COLUMNS[n]:
        return Support(False, f"x has {x.shape[-1]} input features, not a multiple of {PART_COLUMNS[n]}")
    return supports_tokens("nm_linear", x)


def _supports(x: torch.Tensor, *args, **kwargs) -> Support:
    return can_place_columns("x", x.shape[-1])


IMPLEMENTATIONS = (Implementation("cuda", _cuda, _supports_few), Implementation("triton", _triton, _supports))
