"""`nm_unpack`: unpack a weight that `nm_pack` packed."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_tensor, check_whole
from ..layouts.packed_rows import check_nm_rows, code_bits, pack_nm_rows, stored_per_row, unpack_nm_rows
from ._registry import define_op, sample
from .nm_linear import check_pattern, sparse_weight

SCHEMA = "(Tensor values, Tensor codes, int n, int m, int features) -> Tensor"


def nm_unpack(values: torch.Tensor, codes: torch.Tensor, n: int, m: int, features: int) -> torch.Tensor:
    """Unpack a dense weight: `nm_unpack(**nm_pack(weight, n, m), n=n, m=m, features=weight.shape[1])`.

    The contents of all tensors are checked, so that damaged or hostile input is refused.

    Args:
        values: `[out_features, stored]` float32, bfloat16 or float16.
        codes: `[out_features, stored * bits / 32]` int32, with 2 bits per position for `m` up to 4, otherwise 4.
        n: kept values of a group.
        m: columns of a group, at most 16. It divides `features`.
        features: columns of the weight.

    Returns:
        `[out_features, features]` of the dtype of `values`, `+0.0` where nothing is stored.

    Raises:
        TypeError: a wrong dtype; `n`, `m` or `features` is not a whole number.
        ValueError: wrong shapes or devices; a pattern without a layout; positions that do not ascend, or are not below `m`, named by
            their row and group; a non-zero after the last value of a row.
    """
    check_tensor("values", values, ndim=2, dtypes=HALF_OR_FLOAT)
    check_pattern(n, m)
    check_whole("features", features, 0)
    if features % m:
        raise ValueError(f"features: expected a number divisible by m = {m}, got {features}")
    stored = stored_per_row(features, n, m, values.dtype)
    check_tensor("values", values, ndim=2, dtypes=HALF_OR_FLOAT, shape=(None, stored))
    code_shape = (values.shape[0], stored * code_bits(m) // 32)
    check_tensor("codes", codes, ndim=2, dtypes=(torch.int32,), shape=code_shape, device=values.device)
    return _op(values, codes, n, m, features)


def reference(values: torch.Tensor, codes: torch.Tensor, n: int, m: int, features: int) -> torch.Tensor:
    check_nm_rows(values, codes, n, m, features)
    return unpack_nm_rows(values, codes, n, m, features)


def _fake(values, codes, n, m, features):
    torch._check(values.dim() == 2)
    return values.new_empty((values.shape[0], features))


def _samples(generator: torch.Generator):
    for rows, columns, n, m, dtype in (
        (5, 24, 2, 4, torch.float32),
        (33, 136, 2, 4, torch.bfloat16),
        (18, 330, 1, 3, torch.float16),
        (7, 80, 3, 8, torch.bfloat16),
        (70, 1024, 2, 4, torch.bfloat16),
    ):
        yield sample(*pack_nm_rows(sparse_weight(rows, columns, n, m, dtype, generator), n, m).values(), n, m, columns)


_op = define_op("nm_unpack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
