"""`nm_pack`: pack an N:M weight for `nm_linear`."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_tensor
from ..layouts.packed_rows import check_fits, code_bits, pack_nm_rows, stored_per_row
from ._registry import define_op, sample
from .nm_linear import check_pattern, sparse_weight

SCHEMA = "(Tensor weight, int n, int m) -> (Tensor values, Tensor codes)"


def nm_pack(weight: torch.Tensor, n: int, m: int) -> dict[str, torch.Tensor]:
    """Pack an N:M weight into its values and their positions: `nm_linear(x, **nm_pack(weight, n, m), n=n, m=m)` multiplies by it.

    Packed models store these tensors. `sparsekern.layouts.packed_rows` describes the layout.

    Args:
        weight: `[out_features, in_features]` float32, bfloat16 or float16, any strides, with at most `n` non-zeros in every `m`
            columns. `-0.0` counts as zero; a NaN is kept.
        n: kept values of a group.
        m: columns of a group, at most 16. It divides `in_features`.

    Returns:
        The packed tensors by name, contiguous and on the device of `weight`. `values`: `[out_features, stored]` of the dtype of
        `weight`. `codes`: `[out_features, stored * bits / 32]` int32, with 2 bits per position for `m` up to 4, otherwise 4.

    Raises:
        TypeError: a wrong dtype; `n` or `m` is not a whole number.
        ValueError: a weight that is not 2-D, or whose features `m` does not divide; a pattern without a layout; a group with more
            than `n` non-zeros, named by its row and columns.
    """
    check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
    check_pattern(n, m)
    if weight.shape[1] % m:
        raise ValueError(f"weight: expected input features divisible by m = {m}, got {weight.shape[1]}")
    values, codes = _op(weight, n, m)
    return {"values": values, "codes": codes}


def reference(weight: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_fits(weight, n, m)
    packed = pack_nm_rows(weight, n, m)
    return packed["values"], packed["codes"]


def _fake(weight, n, m):
    torch._check(weight.dim() == 2)
    rows, columns = weight.shape
    stored = stored_per_row(columns, n, m, weight.dtype)
    return weight.new_empty((rows, stored)), weight.new_empty((rows, stored * code_bits(m) // 32), dtype=torch.int32)


def _samples(generator: torch.Generator):
    for rows, columns, n, m, dtype in (
        (5, 24, 2, 4, torch.float32),
        (33, 136, 2, 4, torch.bfloat16),
        (18, 330, 1, 3, torch.float16),
        (7, 80, 3, 8, torch.bfloat16),
        (70, 1024, 2, 4, torch.bfloat16),
    ):
        weight = sparse_weight(rows, columns, n, m, dtype, generator)
        yield sample(weight, n, m)
        yield sample((weight * (weight < 1)).T.contiguous().T, n, m)


_op = define_op("nm_pack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
