"""`nm_q4_pack`: round an N:M weight to 4-bit values and pack it for `nm_q4_linear`."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_finite, check_tensor
from ..layouts.nm_q4 import COLUMNS, Q4Layout, pack_q4
from ._registry import define_op, sample
from .nm_linear import sparse_weight
from .nm_q4_linear import check_q4_pattern, random_scales

SCHEMA = "(Tensor weight, Tensor scales, int n, int m) -> Tensor"


def nm_q4_pack(weight: torch.Tensor, scales: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Round each weight to the nearest of -8 to 7 times its scale, ties to even, and pack it with its position.

    `nm_q4_scales` finds scales. Packed models store the result; `sparsekern.layouts.nm_q4` describes the layout.

    Args:
        weight: `[out_features, in_features]` float32, bfloat16 or float16, any strides. Rounded, it has at most `n` non-zeros in every
            `m` columns.
        scales: `[out_features, ceil(in_features / 64)]` float16, one for each row and 64 columns; a scale of 0 makes them 0.
        n: kept values of a group.
        m: columns of a group; it divides `in_features`. The patterns are 2:4, 1:4 and 4:16.

    Returns:
        `[strips, ceil(in_features / 64), bytes]` uint8, contiguous.

    Raises:
        TypeError: a wrong dtype; `n` or `m` is not a whole number.
        ValueError: wrong shapes or devices; a pattern without a layout; a value that is not finite; a group with more than `n`
            non-zeros, named by its row and columns.
    """
    check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
    check_q4_pattern(n, m)
    if weight.shape[1] % m:
        raise ValueError(f"weight: expected input features divisible by m = {m}, got {weight.shape[1]}")
    shape = (weight.shape[0], -(-weight.shape[1] // COLUMNS))
    check_tensor("scales", scales, ndim=2, dtypes=(torch.float16,), shape=shape, device=weight.device)
    return _op(weight, scales, n, m)


def reference(weight: torch.Tensor, scales: torch.Tensor, n: int, m: int) -> torch.Tensor:
    check_finite("weight", weight)
    check_finite("scales", scales)
    return pack_q4(weight, scales, n, m)


def _fake(weight, scales, n, m):
    torch._check(weight.dim() == 2)
    return weight.new_empty(Q4Layout(n, m).shape(*weight.shape), dtype=torch.uint8)


def _samples(generator: torch.Generator):
    for rows, columns, n, m, dtype in (
        (5, 24, 2, 4, torch.float32),
        (33, 136, 2, 4, torch.bfloat16),
        (40, 128, 1, 4, torch.float16),
        (70, 1024, 4, 16, torch.bfloat16),
    ):
        weight = sparse_weight(rows, columns, n, m, dtype, generator)
        yield sample(weight, random_scales(rows, columns, generator), n, m)
        yield sample((weight * (weight < 1)).T.contiguous().T, random_scales(rows, columns, generator), n, m)


_op = define_op("nm_q4_pack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
