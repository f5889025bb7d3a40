"""The layout of GGUF's Q4_0, which holds the same numbers as `layouts.nm_q4` without leaving zeros out.

A block is 32 columns of a row in 18 bytes: a float16 scale, then 16 bytes. Byte `j` holds the codes of columns `j` and `16 + j`, the
first in the low half. A code is `q + 8`, and the weight `scale * q`.
"""

from __future__ import annotations

import torch

from .nm_q4 import COLUMNS, ZERO, quantize_weight

BLOCK_COLUMNS = 32
BLOCK_BYTES = 18


def q4_0_rows(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return a weight in Q4_0, each value rounded to a multiple of its scale: without loss for what `nm_q4_unpack` returns.

    Args:
        weight: `[rows, columns]` of floating point; columns divisible by 32.
        scales: `[rows, ceil(columns / 64)]` float16.

    Returns:
        `[rows, columns / 32 * 18]` uint8.
    """
    rows, columns = weight.shape
    halves = (quantize_weight(weight, scales) + ZERO).to(torch.uint8).view(rows, -1, 2, BLOCK_COLUMNS // 2)
    codes = halves[:, :, 0] | halves[:, :, 1] << 4
    own = scales.repeat_interleave(COLUMNS // BLOCK_COLUMNS, 1)[:, : columns // BLOCK_COLUMNS, None]
    return torch.cat((own.clone(memory_format=torch.contiguous_format).view(torch.uint8), codes), -1).flatten(1)
