"""The layout of GGUF's Q8_0, which repeats the scale of a row of `layouts.int8_rows` in each of its blocks.

A block is 32 columns of a row in 34 bytes: a float16 scale, then 32 int8. The weight is `scale * value`.
"""

from __future__ import annotations

import torch

from .int8_rows import MOST
from .q4_0 import BLOCK_COLUMNS


def held_by_float16(scales: torch.Tensor) -> torch.Tensor:
    """Return for each scale whether it is a number of float16, so that Q8_0 holds its row without loss."""
    return scales.half().float() == scales


def check_scales(scales: torch.Tensor) -> None:
    """Raise `ValueError` if a scale is beyond float16."""
    if bool((beyond := scales.half().isinf()).any()):
        row = int(beyond.nonzero()[0])
        raise ValueError(
            f"scales: expected at most {torch.finfo(torch.float16).max:,.0f}, got {float(scales[row]):.4g} in row {row}"
        )


def q8_0_rows(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return rows of 8-bit values in Q8_0.

    A row whose scale is not representable in float16 is rounded to multiples of the nearest one.

    Args:
        values: `[rows, columns]` int8; columns divisible by 32.
        scales: `[rows]` float32, which pass `check_scales`.

    Returns:
        `[rows, columns / 32 * 34]` uint8.
    """
    halves = scales.half()
    inexact = ~held_by_float16(scales)
    if bool(inexact.any()):
        values = values.clone()
        divisor = halves[inexact].float()
        weight = values[inexact].float() * scales[inexact, None]
        rounded = (weight / divisor.where(divisor > 0, 1.0)[:, None]).round().clamp(-MOST, MOST)
        values[inexact] = rounded.to(torch.int8)
    rows, columns = values.shape
    blocks = values.contiguous().view(torch.uint8).view(rows, columns // BLOCK_COLUMNS, BLOCK_COLUMNS)
    own = halves.contiguous().view(torch.uint8).view(rows, 1, 2).expand(-1, blocks.shape[1], -1)
    return torch.cat((own, blocks), -1).flatten(1)
