"""The C++ kernels for at most 16 tokens and packed weights: what they support, and `x` as they read it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import torch
from torch.nn.functional import pad

from .devices import Support, has_capability

MOST_TOKENS = 16
HALF = (torch.bfloat16, torch.float16)
LEAST = (8, 0)


def supports_tokens(op: str, x: torch.Tensor, dtypes: Collection[torch.dtype] = HALF) -> Support:
    """Return whether the kernel of `op` multiplies `x`: at most 16 tokens of `dtypes`, on a device with its instructions."""
    if not is_built(op):
        return Support(False, "the compiled library has no kernel for it: it was built from another version")
    if x.dtype not in dtypes:
        return Support(False, f"x is {str(x.dtype).removeprefix('torch.')}, not of 16 bits")
    if not x.numel() or x.numel() > MOST_TOKENS * x.shape[-1]:
        return Support(False, f"x has more than {MOST_TOKENS} tokens, or none")
    return has_capability(x.device, LEAST)


@functools.cache
def is_built(op: str) -> bool:
    """Return whether the compiled library has a kernel of `op`."""
    return hasattr(torch.ops.sparsekern_cuda, op)


@functools.cache
def raw(op: str) -> Callable[..., torch.Tensor]:
    """Return the C++ kernel of `op`, which is built."""
    kernel: Callable[..., torch.Tensor] = getattr(torch.ops.sparsekern_cuda, op).default._op
    return kernel


def as_tokens(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return `x` as contiguous `[tokens, columns]`, padded with zeros to a multiple of `multiple` columns."""
    columns = x.shape[-1]
    if x.dim() != 2:
        x = x.reshape(x.shape[:-1].numel(), columns)
    return pad(x, (0, -columns % multiple)) if columns % multiple else x.contiguous()
