"""`nm_q4_linear` on a CUDA device: the C++ kernel for few tokens and 2:4; more tokens and other patterns are left to the reference."""

from __future__ import annotations

import torch

from ..layouts.nm_q4 import COLUMNS
from .decode import HALF, as_tokens, raw, supports_tokens
from .devices import Support, can_place_columns
from .implementation import Implementation


def _cuda(
    x: torch.Tensor, blocks: torch.Tensor, n: int, m: int, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y = raw("nm_q4_linear")(as_tokens(x, COLUMNS), blocks.contiguous(), out_features, None if bias is None else bias.contiguous())
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _supports(x: torch.Tensor, blocks: torch.Tensor, n: int, m: int, out_features: int, *args, **kwargs) -> Support:
    if (n, m) != (2, 4):
        return Support(False, f"the pattern is {n}:{m}, not 2:4")
    able = can_place_columns("x", x.shape[-1])
    return supports_tokens("nm_q4_linear", x, (*HALF, torch.float32)) if able.ok else able


IMPLEMENTATIONS = (Implementation("cuda", _cuda, _supports),)
