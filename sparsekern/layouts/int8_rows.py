"""The layout of weights of 8-bit values with a scale for each row: the weight is `scales[row] * values[row, column]`.

`values` are int8 `[rows, columns]` from -127 to 127, `scales` float32 `[rows]`. Nothing is left out, so that it suits weights without zeros:
the head of a model, and the embeddings tied to it.
"""

from __future__ import annotations

import torch

MOST = 127
LEAST_HALF = 2.0**-14  # below it, float16 has fewer digits
MOST_HALF = torch.finfo(torch.float16).max
ROWS_AT_ONCE = 1024  # bounds the memory of float32 copies


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each value to the nearest multiple of its row's scale, the row's largest magnitude divided by 127.

    A scale is rounded to float16 where it is a normal one, so that formats with scales of 16 bits hold the same weight.

    Args:
        weight: `[rows, columns]` of floating point.

    Returns:
        `values`, `[rows, columns]` int8, and `scales`, `[rows]` float32.

    Raises:
        ValueError: a value is not finite.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for first in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        own = weight[rows].float()
        largest = own.abs().amax(1) if own.shape[1] else own.new_zeros(len(own))
        if not bool(largest.isfinite().all()):
            row = first + int((~largest.isfinite()).nonzero()[0])
            raise ValueError(f"weight: expected finite values, got {float(largest[row - first])} in row {row}")
        scale = largest / MOST
        half = scale.half().float()
        fits = (half * MOST <= MOST_HALF) | (largest > MOST_HALF)  # what float16 held it can hold again
        scale = torch.where((half >= LEAST_HALF) & half.isfinite() & fits, half, scale)
        scales[rows] = scale
        divisor = torch.where(scale > 0, scale, 1.0)
        values[rows] = (own / divisor[:, None]).round_().clamp_(-MOST, MOST).to(torch.int8)
    return values, scales


def restore_rows(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return rows of the weight, rounded to `dtype`.

    Args:
        values: `[..., columns]` int8.
        scales: `[...]` float32.
        dtype: of the result.
    """
    if dtype == torch.float32 or values.dim() != 2:
        return (values.float() * scales[..., None]).to(dtype)
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    for first in range(0, len(values), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        weight[rows] = values[rows].float() * scales[rows, None]
    return weight


def check_int8(values: torch.Tensor, scales: torch.Tensor) -> None:
    """Raise `ValueError` unless the tensors hold what `quantize_rows` makes."""
    unsound = ~(scales.isfinite() & (scales >= 0))
    if bool(unsound.any()):
        row = int(unsound.nonzero()[0])
        raise ValueError(f"scales: expected finite values of at least 0, got {float(scales[row])} in row {row}")
    if values.numel() and int(values.min()) < -MOST:
        row = int((values == -MOST - 1).any(1).nonzero()[0])
        raise ValueError(f"values: expected -{MOST} to {MOST}, got {-MOST - 1} in row {row}")
